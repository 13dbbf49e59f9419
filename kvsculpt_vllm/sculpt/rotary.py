"""Move queries to other positions."""

from __future__ import annotations

from collections.abc import Iterator

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
        """Queries (…, P, heads, D) that were rotated at positions `origin` (P,), as they would be at `target` (P,).

        Undoing a rotation divides by cos² + sin², which is not 1 where the scaling (YaRN) also changes the length.
        """
        return self.turned(queries, self.turn(origin, target))

    def turn(self, origin: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What takes queries from positions `origin` (P,) to `target` (P,): cosines and sines (P, 1, rotary_dim/2)."""
        half = self.rotary_dim // 2
        cos_o, sin_o = self.cache[origin].float().split(half, dim=-1)
        cos_t, sin_t = self.cache[target].float().split(half, dim=-1)
        norm = torch.addcmul(cos_o.square(), sin_o, sin_o)
        cos = torch.addcmul(cos_t * cos_o, sin_t, sin_o) / norm
        sin = torch.addcmul(sin_t * cos_o, cos_t, sin_o, value=-1) / norm
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(self, queries: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Queries (…, P, heads, D) after a `turn` of this embedding's."""
        cos, sin = turn
        rotated, rest = queries.float().split([self.rotary_dim, queries.shape[-1] - self.rotary_dim], dim=-1)
        a, b = rotated.chunk(2, dim=-1) if self.is_neox_style else (rotated[..., 0::2], rotated[..., 1::2])
        # In one kernel less each than written out: a solve's launches are many and small.
        parts = [torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)]
        moved = torch.cat(parts, dim=-1) if self.is_neox_style else torch.stack(parts, dim=-1).flatten(-2)
        return torch.cat([moved, rest], dim=-1) if rest.shape[-1] else moved

    def explains(self, queries: Tensor, positions: Tensor) -> bool:
        """Whether it makes of the first of `queries` (P, heads, D) all the others.

        A model asked them at `positions` (P,) of one and the same content.
        """
        if self.rotary_dim > queries.shape[-1] or int(positions.max()) >= self.num_positions:
            return False
        moved = self.move(queries[:1].expand_as(queries), positions[:1].expand_as(positions), positions)
        return same_queries(moved, queries)


def same_queries(one: Tensor, other: Tensor) -> bool:
    """Whether queries (P, heads, D) are the same but for rounding to the dtype of `other`."""
    tolerance = 1e-3 if other.dtype.itemsize >= 4 else 2e-2
    one, other = one.float(), other.float()
    # A head at a time: a loud one would cover a quiet one that is turned otherwise.
    return bool(((one - other).norm(dim=-1) <= tolerance * other.norm(dim=-1)).all())


def rotaries_of(cos: Tensor, sin: Tensor) -> Iterator[Rotary]:
    """What cosines and sines (positions, n), as transformers' modules give them, can mean.

    Most give every angle twice, one copy after the other, whether their model turns the two halves of a head or
    neighbours; a few give both copies side by side, or each angle once. Only the model's queries tell.
    """
    half, n = cos.shape[1] // 2, cos.shape[1]
    for angles, neox_first in ((slice(half), True), (slice(0, n, 2), False), (slice(n), True)):
        cache = torch.cat([cos[:, angles], sin[:, angles]], dim=-1)
        for is_neox_style in (neox_first, not neox_first):
            yield Rotary(cache, cache.shape[1], is_neox_style)
