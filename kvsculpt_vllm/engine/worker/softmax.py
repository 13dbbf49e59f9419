"""What a rank's attention layers do in their softmax besides scaling logits, as a fit takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sink_logits_of(impls: Sequence[Any], num_heads: int, device: torch.device) -> Tensor | None:
    """Logits (layers, query heads) of the learned sinks of vLLM's attention implementations, float32; -inf in a layer
    that has none, None if no layer has one.

    They are weights, which may be replaced while a server runs: to be asked for anew at every solve.
    """
    sinks = [impl.sinks for impl in impls]
    if all(of_layer is None for of_layer in sinks):
        return None
    none = torch.full((num_heads,), -torch.inf, device=device)
    return torch.stack([none if of_layer is None else of_layer.detach().to(none) for of_layer in sinks])


def have_sinks(impls: Sequence[Any]) -> bool:
    """Whether any of the layers has learned sinks."""
    return any(impl.sinks is not None for impl in impls)


def soft_cap_of(impl: Any) -> float | None:
    """The soft cap on a layer's logits, which all layers have or none (`refusals.layers.check_attention_layers`).
    vLLM's CPU attention says 0 for none.
    """
    return impl.logits_soft_cap or None
