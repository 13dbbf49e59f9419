"""A context that is read twice: what the second reading asks, and how it follows from what the first one asked."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from kvsculpt_vllm.calibration_file import StoredMaps
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.sculpt.foretold import SHARPLY
from kvsculpt_vllm.sculpt.memory import max_elements
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.queries import asked_problems, held_out_of
from kvsculpt_vllm.sculpt.selection import batches, teach

WANTED, WANTING = 0.2, 0.03
"""An entry is wanted by a second reading if one query gives it so much of its attention, and a head copies if so many
of its entries are wanted. On SmolLM2-135M that is a fifth of the heads, which want 95 % of all that is wanted."""

UNSURE = 32
"""A second reading's first tokens do not tell yet that it is one: maps are not learned from them."""

RIDGE = 1e-3
"""Of the mean square of a query's numbers, added to each of these squares in the regression."""


class SecondReading:
    """A context, and the same once more right behind it."""

    def __init__(self, model: EvaluationModel, tokens: Sequence[int], prefix: int) -> None:
        """Read `tokens` twice, the first `prefix` of them (a BOS token, say) once."""
        self._model, self._number, self._prefix = model, len(tokens), prefix
        twice = [*tokens, *tokens[prefix:]]
        self._recording = model.record(twice, torch.arange(len(twice)))

    def problems(self, count: int, span: int, sinks: int, alone: bool = True) -> Problems:
        """Build the problems of the context's first `span` tokens, of which `sinks` stay exact, that are asked by the
        queries at `count` positions of the second reading. They see the first reading `alone`, as only its entries are
        to be compressed, or as the model does what comes before them in their own reading, too.
        """
        recording, available = self._recording, self._number - self._prefix
        seen = self._number if alone else None
        spread = torch.linspace(0, available - 1, min(count, available), dtype=torch.float64).round().long()
        positions = self._number + spread
        return asked_problems(
            recording.queries[:, positions.to(recording.queries.device)],
            positions,
            held_out_of(len(positions)),
            keys=recording.keys[:, :seen],
            values=recording.values[:, :seen],
            span=span,
            sinks=sinks,
            scale=recording.scale,
            soft_cap=recording.soft_cap,
            sink_logits=recording.sink_logits,
        )

    def queries(self) -> tuple[Tensor, Tensor]:
        """The queries (L, P, heads, D) float32 of the tokens that were read twice, in the first and in the second
        reading, both as they are at position 0.
        """
        first = torch.arange(self._prefix, self._number, device=self._recording.queries.device)
        return self._at_0(first), self._at_0(first + self._number - self._prefix)

    def _at_0(self, positions: Tensor) -> Tensor:
        origin = torch.zeros_like(positions)
        layers = zip(self._model.rotaries, self._recording.queries[:, positions].float(), strict=True)
        return torch.stack(
            [asked if rotary is None else rotary.move(asked, positions, origin) for rotary, asked in layers]
        )


class Foreteller:
    """Learns, context by context, which heads copy, and what makes of their queries in a first reading those in a
    second: a ridge regression for each query head.
    """

    def __init__(self) -> None:
        self._contexts = 0
        self._wanted: Tensor | float = 0.0  # (L·H,) the sum over contexts
        self._squares: Tensor | float = 0.0  # (L, heads, D + 1, D + 1) in float64, as the next
        self._products: Tensor | float = 0.0  # (L, heads, D + 1, D)

    def add(self, reading: SecondReading, span: int, sinks: int) -> None:
        """Learn from one context more, of which the first `span` tokens but `sinks` are to be compressed."""
        self._contexts += 1
        self._wanted = self._wanted + wanted_shares(reading.problems(sys.maxsize, span, sinks, alone=False))
        first, second = (queries[:, UNSURE:].transpose(1, 2).double() for queries in reading.queries())
        known = torch.cat([first, torch.ones_like(first[..., :1])], dim=-1)  # (L, heads, P, D + 1)
        self._squares = self._squares + known.transpose(2, 3) @ known
        self._products = self._products + known.transpose(2, 3) @ second

    @property
    def kv_heads(self) -> int:
        """KV heads of each layer.

        Raises:
            ValueError: nothing was learned from.
        """
        wanted, squares = self._learned()
        return len(wanted) // len(squares)

    def maps(self) -> StoredMaps | None:
        """The maps of the heads that copy; None if no head does.

        Raises:
            ValueError: nothing was learned from.
        """
        wanted, squares = self._learned()
        num_layers, query_heads = squares.shape[:2]
        per_layer = self.kv_heads
        wanted = wanted / self._contexts
        numbers = (wanted >= WANTING).nonzero()[:, 0].tolist()
        if not numbers:
            return None
        ridge = RIDGE * squares.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        unit = torch.eye(squares.shape[-1], dtype=torch.float64, device=squares.device)
        learned = torch.linalg.solve(squares + ridge * unit, self._products)
        learned = learned.view(num_layers * per_layer, query_heads // per_layer, *learned.shape[-2:])
        chosen = learned[torch.tensor(numbers, device=learned.device)]
        heads = [divmod(number, per_layer) for number in numbers]
        return StoredMaps.of(heads, chosen.cpu().numpy(), wanted[numbers].tolist())

    def _learned(self) -> tuple[Tensor, Tensor]:
        if not isinstance(self._wanted, Tensor) or not isinstance(self._squares, Tensor):
            raise ValueError("there is no context to learn from")
        return self._wanted, self._squares


def wanted_shares(asked: Problems) -> Tensor:
    """Say which share of each head's entries (B,) a second reading wants."""
    limit, nothing = max_elements(asked.keys.device), torch.arange(0)
    shares = []
    for own in batches(asked, limit):
        received = teach(asked.take(own), limit, SHARPLY, answered=nothing).attention
        assert received is not None  # as a power is given
        shares.append((received >= WANTED**SHARPLY).double().mean(1))
    return torch.cat(shares)
