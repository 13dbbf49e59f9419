"""A batch of fits: one problem is one KV head of one layer of one request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.attention import attend, attend_all, merge, with_sink
from kvsculpt_vllm.sculpt.memory import max_elements
from kvsculpt_vllm.sculpt.transfer import on_device

if TYPE_CHECKING:
    from kvsculpt_vllm.sculpt.foretold import QueryMaps
    from kvsculpt_vllm.sculpt.slices import Slices


@dataclass(frozen=True)
class Problems:
    """What the compressed entries of B KV heads must reproduce: one problem is one head.

    The softmax of a problem runs over the span's entries *and* the retained ones (sinks, recent window), as in KVSculpt
    (arXiv 2603.27819), and over what earlier segments left. The retained ones never change. So for each query they act
    as one more entry with logit `retained_lse` and value `retained_out`, and the solver needs to know nothing else of
    them. A learned sink is one of them (`retained_attention`).
    """

    queries: Tensor  # (B, Q, D)
    keys: Tensor  # (B, n, D) entries of the span that may be replaced
    values: Tensor  # (B, n, D)
    retained_lse: Tensor  # (B, Q) fp32, -inf where a query sees no retained entry
    retained_out: Tensor  # (B, Q, D) fp32
    held_out: Tensor  # (Q,) bool, queries that no fit may use; on the host, so that nobody waits to know which they are
    scale: float
    soft_cap: float | None = None  # of the logits, those of retained entries included (`kernels.soft_cap`)
    group: int = 1  # consecutive query rows that share a position: the query heads of the KV head's group
    # So many of the last query positions ask from their own place in the prompt. The positions before them ask from a
    # place behind the prompt. 0 where that is not known.
    recent: int = 0
    followed: bool = False  # whether other segments come behind this one, so that it is read from afar
    # Builds the problems of those heads that have maps, in their order, as a second reading would ask them. None where
    # the first reading's queries are no longer known.
    foretell: Callable[[QueryMaps], Slices[Problems]] | None = field(default=None, compare=False)

    @property
    def num_problems(self) -> int:
        """B."""
        return self.queries.shape[0]

    @property
    def num_entries(self) -> int:
        """n, the entries of each problem's span that may be replaced."""
        return self.keys.shape[1]

    def take(self, index: Tensor | slice) -> Problems:
        """Keep the problems in `index` (LongTensor), every tensor in float32. With a slice, what is so already is not
        copied.
        """
        return replace(
            self,
            queries=self.queries[index].float(),
            keys=self.keys[index].float(),
            values=self.values[index].float(),
            retained_lse=self.retained_lse[index].float(),
            retained_out=self.retained_out[index].float(),
            foretell=None,  # it knows all problems
        )

    def thin_rows(self, count: int) -> Tensor:
        """Choose about `count` query rows (LongTensor, on the host): whole positions, spread evenly over the training
        ones and over the held-out ones.
        """
        rows = thin_positions(self.held_out.view(-1, self.group)[:, 0], count / self.group)[:, None] * self.group
        return (rows + torch.arange(self.group, device=rows.device)).flatten()

    def with_rows(self, rows: Tensor) -> Problems:
        """Keep only the query rows `rows` (LongTensor, on the host) of every problem."""
        there = on_device(rows, self.keys.device)
        return replace(
            self,
            queries=self.queries[:, there],
            retained_lse=self.retained_lse[:, there],
            retained_out=self.retained_out[:, there],
            held_out=self.held_out[rows],
            recent=0,  # no longer known
        )


def thin_positions(held_out: Tensor, count: float) -> Tensor:
    """Choose about `count` of the positions (LongTensor, ascending) that `held_out` (A,) bool is of, spread evenly over
    the training ones and over the held-out ones.
    """
    share = min(1.0, count / len(held_out))
    kept = []
    for part in (~held_out, held_out):
        positions = part.nonzero()[:, 0]
        number = max(1, round(share * len(positions)))
        spread = torch.linspace(0, len(positions) - 1, number, dtype=torch.float64, device=positions.device)
        kept.append(positions[spread.round().long()])
    return torch.cat(kept).sort().values


@dataclass(frozen=True)
class Earlier:
    """The entries of the segments before, one tensor per problem: each head has kept a number m_b of its own.

    Of a long context they are gigabytes. A sequence that reads each head's entries when it is asked for them is as good
    as a list: one head's entries are used at a time.
    """

    keys: Sequence[Tensor]  # B tensors (m_b, D), any dtype
    values: Sequence[Tensor]  # B tensors (m_b, D)

    def part(self, own: Sequence[int]) -> Earlier:
        """Keep the problems in `own`."""
        return Earlier(_Some(self.keys, own), _Some(self.values, own))


class _Some(Sequence[Tensor]):
    """Some of a sequence's tensors, read when they are asked for."""

    def __init__(self, every: Sequence[Tensor], numbers: Sequence[int]) -> None:
        self._every, self._numbers = every, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # nobody wants a run of them
        return self._every[self._numbers[index]]


def retained_attention(
    queries: Tensor,  # (B, Q, D) fp32
    query_positions: Tensor,  # (Q,) absolute positions, shared by all problems
    sink_keys: Tensor,  # (B, s, D)
    sink_values: Tensor,  # (B, s, D)
    recent_keys: Tensor,  # (B, w, D) the tail's prompt tokens
    recent_values: Tensor,  # (B, w, D)
    recent_positions: Tensor,  # (w,)
    scale: float,
    earlier: Earlier | None = None,  # of these B problems
    sink_logits: Tensor | None = None,  # (B, Q) fp32, of each query's head; None for a model without learned sinks
    soft_cap: float | None = None,  # of the logits, but for those of learned sinks
) -> tuple[Tensor, Tensor]:
    """Compute the attention over the entries that stay as they are: output (B, Q, D) and log-sum-exp (B, Q), float32.

    Every query sees the sinks and the entries of earlier segments; a recent entry is seen by queries at its position or
    later (causality). A learned sink (gpt-oss, arXiv 2508.10925) is one entry more that every query of its head sees:
    it has a logit of its own, which no query changes, and the value 0. A query that sees nothing has log-sum-exp -inf.
    """
    keys = torch.cat([sink_keys, recent_keys], dim=1).float()
    values = torch.cat([sink_values, recent_values], dim=1).float()
    num_sinks = sink_keys.shape[1]
    sees_sinks = torch.ones(len(query_positions), num_sinks, dtype=torch.bool, device=keys.device)
    sees_recent = query_positions[:, None] >= recent_positions[None, :]
    visible = torch.cat([sees_sinks, sees_recent], dim=1)
    # In parts: for a window of 30,000 tokens all the weights together would take gigabytes.
    limit = max_elements(keys.device)
    step = max(1, limit // max(1, len(keys) * keys.shape[1]))
    parts = [
        attend(some, keys, values, scale, seen[None], soft_cap)
        for some, seen in zip(queries.split(step, dim=1), visible.split(step), strict=True)
    ]
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(of, dim=1) for of in zip(*parts, strict=True))
    if sink_logits is not None:
        out, lse = with_sink(out, lse, sink_logits)
    if earlier is not None:
        # A head at a time: padded to the longest, heads with few entries would cost as much as it does.
        for b, head_keys, head_values in zip(range(len(out)), earlier.keys, earlier.values, strict=True):
            _merge_head(out[b], lse[b], queries[b], head_keys, head_values, scale, soft_cap, limit)
    return out, lse


def _merge_head(
    out: Tensor,  # (Q, D) fp32, changed in place
    lse: Tensor,  # (Q,) fp32, changed in place
    queries: Tensor,  # (Q, D) fp32
    keys: Tensor,  # (m, D) any dtype
    values: Tensor,  # (m, D)
    scale: float,
    soft_cap: float | None,
    limit: int,  # floats that a temporary may have
) -> None:
    """Add to one head's attention that over more entries."""
    # In float32 the entries of a long context would be hundreds of megabytes.
    entries = max(1, limit // (2 * keys.shape[1]))
    for some_keys, some_values in zip(keys.split(entries), values.split(entries), strict=True):
        some_keys, some_values = some_keys[None].float(), some_values[None].float()
        step = max(1, limit // max(1, some_keys.shape[1]))
        for begin in range(0, len(out), step):
            rows = slice(begin, begin + step)
            more_out, more_lse = attend_all(queries[None, rows], some_keys, some_values, scale, soft_cap)
            out[rows], lse[rows] = merge(out[rows], lse[rows], more_out[0], more_lse[0])
