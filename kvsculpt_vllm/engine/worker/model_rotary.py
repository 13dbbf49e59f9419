"""The rotary embedding of each attention layer, from the model's own modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kvsculpt_vllm.sculpt.rotary import Rotary


def rotary_of_layers(model: nn.Module, layers: Sequence[nn.Module], hf_config: Any) -> list[Rotary | None]:
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
        if (
            module is not None
            and isinstance(cache, Tensor)
            and cache.dim() == 2
            and cache.shape[1] == getattr(module, "rotary_dim", None)
            and getattr(module, "mrope_section", None) is None
            and not (index < len(without) and not without[index])
        ):
            rotaries.append(Rotary(cache, module.rotary_dim, module.is_neox_style))
        else:
            rotaries.append(None)
    return rotaries
