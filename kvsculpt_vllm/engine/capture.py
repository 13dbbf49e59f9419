"""A bounded sample of each prompt's queries, kept per request and layer while the prompt is computed in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RECENT_SHARE = 0.25
"""Share of a sample that are the prompt's last queries as they are; the rest become synthetic future queries."""


def sample_positions(first: int, num_prompt_tokens: int, count: int) -> tuple[Tensor, int]:
    """Positions to keep queries of, ascending, and how many of the last ones are recent.

    The last quarter of `count` is the end of the prompt, the rest is spread evenly over what is computed before
    it, from `first` on (what a prefix-cache hit covers is never computed).
    """
    available = num_prompt_tokens - first
    count = min(count, available)
    recent = min(count, max(1, round(RECENT_SHARE * count)))
    spread = count - recent
    end = num_prompt_tokens - recent - 1
    # In float64: float32 rounds two neighbours to one position where they are many and far from 0.
    earlier = torch.linspace(first, end, spread, dtype=torch.float64).round().long() if spread else None
    last = torch.arange(num_prompt_tokens - recent, num_prompt_tokens)
    return (last if earlier is None else torch.cat([earlier, last])), recent


@dataclass(frozen=True)
class CaptureRows:
    """Rows of one forward pass to copy into one request's sample."""

    sample: QuerySample
    source: Tensor  # (r,) token indices in the batch
    target: slice  # of the sample's positions

    def store(self, layer: int, query: Tensor) -> None:
        """Copy rows of `query` (T, heads, D) of one layer."""
        self.sample.queries[layer, self.target] = query[self.source]


class QuerySample:
    """The sampled queries of one request: (L, P, heads, D) in the model's dtype."""

    def __init__(
        self, positions: Tensor, recent: int, num_layers: int, num_heads: int, head_size: int, like: Tensor
    ) -> None:
        self.positions, self.recent = positions, recent
        self.queries = like.new_empty(num_layers, len(positions), num_heads, head_size)
        self._seen = torch.zeros(len(positions), dtype=torch.bool)

    @property
    def complete(self) -> bool:
        """Whether every sampled position has been computed."""
        return bool(self._seen.all())

    def rows(self, first_position: int, num_tokens: int, first_row: int) -> CaptureRows | None:
        """What to copy from a chunk of tokens that starts at `first_position` and at batch row `first_row`."""
        lo, hi = torch.searchsorted(self.positions, torch.tensor([first_position, first_position + num_tokens]))
        if lo == hi:
            return None
        target = slice(int(lo), int(hi))
        self._seen[target] = True
        return CaptureRows(self, self.positions[target] - first_position + first_row, target)
