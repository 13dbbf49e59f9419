"""Models whose attention or cache is not what compression takes it to be, as the configuration tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvsculpt_vllm.engine.startup.refusals.refusal import OTHER_MODEL, Refusal, Rule
from kvsculpt_vllm.layer_kinds import FULL, WINDOW

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _text_config(config: VllmConfig, *names: str) -> bool:
    return any(getattr(config.model_config.hf_text_config, name, None) for name in names)


def _sliding_window(config: VllmConfig) -> bool:
    model = config.model_config
    layers = getattr(model.hf_text_config, "layer_types", None) or (WINDOW,)
    only_windows = WINDOW in layers and FULL not in layers
    return bool(model.rswa_window) or (model.get_sliding_window() is not None and only_windows)


def _mixed_layers(config: VllmConfig) -> bool:
    model = config.model_config
    types = set(getattr(model.hf_text_config, "layer_types", None) or ())
    other = types - {"full_attention", "attention", "sliding_attention", "chunked_attention"}  # with their own rules
    return model.is_hybrid or model.is_attention_free or model.has_inner_state or bool(other)


CACHED = (
    Rule(
        lambda c: c.model_config.use_mla,
        Refusal("MLA models", "their cache holds latents, no keys and values", OTHER_MODEL),
    ),
    Rule(
        _sliding_window,
        Refusal(
            "sliding-window models",
            "no layer sees more than the last tokens, so there is nothing to compress",
            f"add --disable-sliding-window, which limits the context to the window, or {OTHER_MODEL}",
        ),
    ),
)
"""What lies in the cache."""

LAYERS = (
    Rule(
        _mixed_layers,
        Refusal("hybrid, Mamba and linear-attention models", "not every layer has a KV cache", OTHER_MODEL),
    ),
    Rule(
        lambda c: c.model_config.attention_chunk_size is not None,
        Refusal("models with chunked local attention", "a layer sees one chunk of the context", OTHER_MODEL),
    ),
    Rule(
        lambda c: _text_config(c, "num_kv_shared_layers") or c.cache_config.kv_sharing_fast_prefill,
        Refusal(
            "models whose layers share a KV cache",
            "a shared cache would be fitted for one layer's queries only",
            OTHER_MODEL,
        ),
    ),
    Rule(
        lambda c: c.model_config.is_encoder_decoder,
        Refusal("encoder-decoder models", "cross-attention has a cache of its own", OTHER_MODEL),
    ),
)
"""Which layers there are."""

ATTENTION = (
    Rule(
        lambda c: _text_config(c, "param_sink_number"),
        Refusal("models whose attention sinks have keys", "the fit does not know these entries", OTHER_MODEL),
    ),
    Rule(
        lambda c: c.model_config.uses_alibi,
        Refusal("ALiBi models", "attention depends on positions that packed entries do not have", OTHER_MODEL),
    ),
    Rule(
        lambda c: c.model_config.uses_mrope and c.model_config.supports_multimodal_inputs,
        Refusal(
            "M-RoPE models that read more than text",
            "a token of an image has several positions, none of which is its place in the prompt",
            "add --language-model-only",
        ),
    ),
    Rule(
        lambda c: (
            c.model_config.is_mm_prefix_lm
            or c.model_config.is_diffusion
            or c.diffusion_config is not None
            or c.attention_config.use_non_causal
        ),
        Refusal("models with non-causal attention", "the fit takes attention to be causal", OTHER_MODEL),
    ),
    Rule(
        lambda c: c.model_config.runner_type != "generate",
        Refusal(
            "pooling and embedding models",
            "they do not decode, so there is nothing to save",
            "remove --kv-compression",
        ),
    ),
)
"""What attention depends on, and whether it decodes."""
