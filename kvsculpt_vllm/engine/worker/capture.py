"""A bounded sample of each prompt's queries, kept per request and layer while the prompt is computed in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.logger import init_logger

logger = init_logger("vllm.kvsculpt")


@dataclass(frozen=True)
class CaptureRows:
    """Rows of one forward pass to copy into one request's sample."""

    sample: QuerySample
    source: Tensor  # (r,) token indices in the batch, on the queries' device
    target: slice  # of the sample's positions

    def store(self, layer: int, query: Tensor) -> None:
        """Copy rows of `query` (T, heads, D) of one layer. What goes wrong ends the sampling, not the forward pass."""
        if self.sample.failure is not None or (queries := self.sample.queries) is None:
            return
        try:
            queries[layer, self.target] = query[self.source]
        except Exception as error:  # noqa: BLE001 - the prompt stays exact, and the reason is logged
            self.sample.fail(error)
            return
        # Here and not when the step was planned: a step that replays a CUDA graph never comes here.
        if layer == 0:
            self.sample.saw(self.target)


class QuerySample:
    """The sampled queries of one request: (L, P, heads, D) in the model's dtype."""

    def __init__(
        self, positions: Tensor, recent: int, num_layers: int, num_heads: int, head_size: int, like: Tensor
    ) -> None:
        self.positions, self.recent = positions, recent
        self.failure: str | None = None  # why there will be no sample
        self.refused = False  # for want of room, which is no fault
        self.queries: Tensor | None = None  # after a failure
        self._seen = torch.zeros(len(positions), dtype=torch.bool)
        try:
            self._positions_there = positions.to(like.device)
            self.queries = like.new_empty(num_layers, len(positions), num_heads, head_size)
        except Exception as error:  # noqa: BLE001 - most likely no memory: the prompt stays exact
            self.fail(error)

    @property
    def complete(self) -> bool:
        """Whether the queries of all positions are there."""
        return self.failure is None and bool(self._seen.all())

    def fail(self, error: Exception) -> None:
        """Give the sample up and its memory back."""
        self.failure = f"sampling queries failed: {type(error).__name__}: {error}"
        self.queries = None
        logger.warning("kvsculpt: a prompt will stay exact, %s", self.failure, exc_info=error)

    @classmethod
    def refusal(cls, why: str) -> QuerySample:
        """Make the sample of a prompt whose queries are not kept; `why` says the reason."""
        sample = cls(torch.zeros(0, dtype=torch.long), 0, 0, 0, 0, like=torch.empty(0))
        sample.failure, sample.refused = why, True
        return sample

    @property
    def nbytes(self) -> int:
        """Bytes that the queries take."""
        return 0 if self.failure is not None or self.queries is None else self.queries.nbytes

    def rows(self, first_position: int, num_tokens: int, first_row: int) -> CaptureRows | None:
        """Say what to copy from a chunk of tokens that starts at `first_position` and at batch row `first_row`; None
        for nothing.
        """
        if self.failure is not None:
            return None
        lo, hi = torch.searchsorted(self.positions, torch.tensor([first_position, first_position + num_tokens]))
        if lo == hi:
            return None
        target = slice(int(lo), int(hi))
        return CaptureRows(self, self._positions_there[target] - first_position + first_row, target)

    def saw(self, target: slice) -> None:
        """Note that the queries of these positions are there."""
        self._seen[target] = True
