"""The attention layers of a loaded model, and the queries that they ask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from kvsculpt_vllm.engine.shared.cache_dtype import IN_FP8
from kvsculpt_vllm.engine.startup.refusals.refusal import OTHER_MODEL, Refusal, UnsupportedFeature, refuse

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention


def check_attention_layers(layers: dict[str, Attention]) -> None:
    """Refuse layers whose attention the fit does not model, and layers that do not share one page format.

    Args:
        layers: the model's attention layers by name, as in `static_forward_context`.

    Raises:
        UnsupportedFeature: naming the first layer of every kind that was found.
    """
    from vllm.model_executor.layers.attention import Attention

    found: dict[str, str] = {}
    for name, layer in layers.items():
        for feature in _odd_attention(layer) if type(layer) is Attention else [type(layer).__name__]:
            found.setdefault(feature, name)
    plain = {name: layer for name, layer in layers.items() if type(layer) is Attention}
    shapes = {(layer.head_size, layer.num_heads, layer.num_kv_heads): name for name, layer in plain.items()}
    if len(shapes) > 1:
        found["several head sizes or numbers of heads"] = ", ".join(shapes.values())
    scales = {layer.impl.scale: name for name, layer in plain.items()}
    if len(scales) > 1:
        found["several scales of attention"] = ", ".join(scales.values())
    caps = {getattr(layer.impl, "logits_soft_cap", None) or None: name for name, layer in plain.items()}
    if len(caps) > 1:
        found["several soft caps on attention"] = ", ".join(caps.values())
    refuse([Refusal(f"{what} ({name})", "the fit does not model it", OTHER_MODEL) for what, name in found.items()])


def _odd_attention(layer: Attention) -> Iterable[str]:
    if layer.attn_type != "decoder":
        yield f"{layer.attn_type} attention"
    if layer.sliding_window is not None:
        yield "sliding-window attention"
    if layer.kv_sharing_target_layer_name is not None:
        yield "a KV cache shared between layers"
    if layer.use_mm_prefix:
        yield "non-causal attention to a prefix"
    if getattr(layer, "kv_cache_update_bypass", False):  # vLLM 0.33
        yield "a KV cache that the model writes itself"
    if layer.head_size_v != layer.head_size:
        yield "values of another size than keys"
    if is_quantized_kv_cache(layer.kv_cache_dtype) and layer.kv_cache_dtype not in IN_FP8:
        yield "a quantised KV cache"
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        yield "ALiBi"


def check_positions(restless: list[str], unexplained: list[str]) -> None:
    """Refuse attention layers whose queries cannot be asked from elsewhere.

    Args:
        restless: names of layers whose queries change with the other tokens of their step.
        unexplained: names of layers whose queries depend on the position in a way that is not known.

    Raises:
        UnsupportedFeature: naming the first layer of each.
    """
    found = []
    if restless:
        cause = "what a query looks like depends on the longest position of its step (dynamic RoPE, LongRoPE)"
        cure = "leave out --model-impl, or set --max-model-len to no more than the model's original context"
        found.append(Refusal(f"positions of {restless[0]}", cause, cure))
    if unexplained:
        cause = "no rotary embedding was found that turns its queries as the model does, so none can be asked anew"
        found.append(Refusal(f"positions of {unexplained[0]}", cause, f"try another --model-impl, or {OTHER_MODEL}"))
    refuse(found)


def unseen_queries(layer: str, error: Exception) -> UnsupportedFeature:
    """The refusal of a model that fails when it is run to see what its attention layers are asked."""
    cause = f"a trial run that shows what it is asked failed ({type(error).__name__}: {error})"
    return UnsupportedFeature([Refusal(f"positions of {layer}", cause, f"try another --model-impl, or {OTHER_MODEL}")])
