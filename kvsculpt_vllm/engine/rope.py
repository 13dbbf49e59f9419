"""Move queries to other positions with the model's own rotary module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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


def rotary_of_layers(model: nn.Module, layers: list[nn.Module], hf_config: Any) -> list[Rotary | None]:
    """The rotary embedding used beside each attention layer, None where there is none we understand.

    It is the `rotary_emb` of the module that owns the attention layer. Position schemes with more than one
    position per token (M-RoPE) and layers that the config lists as having none give None.
    """
    owner = {id(child): module for module in model.modules() for child in module.children()}
    without = getattr(hf_config, "no_rope_layers", None) or []
    rotaries: list[Rotary | None] = []
    for index, layer in enumerate(layers):
        module = getattr(owner.get(id(layer)), "rotary_emb", None)
        cache = getattr(module, "cos_sin_cache", None)
        understood = (
            isinstance(cache, Tensor)
            and cache.dim() == 2
            and cache.shape[1] == getattr(module, "rotary_dim", None)
            and getattr(module, "mrope_section", None) is None
            and not (index < len(without) and not without[index])
        )
        rotaries.append(Rotary(cache, module.rotary_dim, module.is_neox_style) if understood else None)
    return rotaries
