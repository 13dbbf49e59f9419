"""Move queries to other positions."""

from __future__ import annotations

import torch
from torch import Tensor


class Rotary:
    """A layer's rotary embedding, read from its cos/sin cache, so that every RoPE scaling is right."""

    def __init__(self, cos_sin_cache: Tensor, rotary_dim: int, is_neox_style: bool) -> None:
        """`cos_sin_cache` is vLLM's: (positions, rotary_dim), cosines then sines, scaling included."""
        self.cache, self.rotary_dim, self.is_neox_style = cos_sin_cache, rotary_dim, is_neox_style

    @property
    def num_positions(self) -> int:
        """Positions that the cache covers."""
        return self.cache.shape[0]

    def move(self, queries: Tensor, origin: Tensor, target: Tensor) -> Tensor:
        """Queries (P, heads, D) that were rotated at positions `origin` (P,), as they would be at `target` (P,).

        Undoing a rotation divides by cos² + sin², which is not 1 where the scaling (YaRN) also changes the length.
        """
        half = self.rotary_dim // 2
        cos_o, sin_o = self.cache[origin].float().split(half, dim=-1)
        cos_t, sin_t = self.cache[target].float().split(half, dim=-1)
        norm = cos_o.square() + sin_o.square()
        cos = ((cos_t * cos_o + sin_t * sin_o) / norm).unsqueeze(1)
        sin = ((sin_t * cos_o - cos_t * sin_o) / norm).unsqueeze(1)
        rotated, rest = queries.float().split([self.rotary_dim, queries.shape[-1] - self.rotary_dim], dim=-1)
        if self.is_neox_style:
            a, b = rotated.split(half, dim=-1)
            moved = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
            moved = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([moved, rest], dim=-1)
