"""The KV cache's dtype, layout and block size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import vllm.envs as envs
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.cache_dtype import is_fp8
from kvsculpt_vllm.engine.shared.groups import has_windows
from kvsculpt_vllm.engine.shared.stores import NO_STORE
from kvsculpt_vllm.engine.startup.refusals.refusal import Refusal, Rule, refuse

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LAYOUTS = ("BLHNC", "LBHNC")
DEFAULT_LAYOUT = "LBHNC"
# The smallest block of the attention kernels by platform; larger ones must be multiples of it.
KERNEL_BLOCK_SIZE = {"cpu": 32, "cuda": 16}


def requested_layout() -> str | None:
    """The layout that `VLLM_KV_CACHE_LAYOUT` asks for, older names resolved."""
    name: str | None = envs.VLLM_KV_CACHE_LAYOUT
    return {"NHD": "LBNHC", "HND": "LBHNC"}.get(name, name) if name is not None else None


def _block_size(config: VllmConfig) -> bool:
    if config.model_config.use_mla:  # refused anyway, and vLLM sets the block size itself
        return False
    return config.cache_config.block_size % KERNEL_BLOCK_SIZE[config.device_config.device_type] != 0


def _other_cache_dtype(config: VllmConfig) -> bool:
    dtype, model = config.cache_config.cache_dtype, config.model_config
    if is_quantized_kv_cache(dtype):  # which has a rule of its own
        return False
    return kv_cache_dtype_str_to_dtype(dtype, model) != model.dtype


def _fine_prefix_match(config: VllmConfig) -> bool:
    return config.cache_config.prefix_match_unit not in (None, config.cache_config.block_size)


def _other_quantised(config: VllmConfig) -> bool:
    return is_quantized_kv_cache(config.cache_config.cache_dtype) and not is_fp8(config)


def fp8_unread(config: VllmConfig) -> bool:
    """Whether no kernel here reads FP8 in the form that entries are sculpted for."""
    from vllm.platforms import current_platform

    if not is_fp8(config):
        return False
    return config.device_config.device_type != "cuda" or not current_platform.has_device_capability(89)


DTYPES = (
    Rule(
        _other_quantised,
        Refusal(
            "a quantised KV cache of this kind",
            "optimised keys and values have no scales to be stored with",
            "use --kv-cache-dtype fp8 on CUDA, or the model's own dtype",
        ),
    ),
    Rule(
        lambda c: fp8_unread(c),
        Refusal(
            "a quantised KV cache on this device",
            "sculpted FP8 is read by the plugin's own kernels, on GPUs that compute with it (compute capability 8.9)",
            "use --kv-cache-dtype bfloat16, or whichever dtype the model has",
        ),
    ),
    Rule(
        lambda c: is_fp8(c) and has_windows(c),
        Refusal(
            "a quantised KV cache of a model with sliding windows",
            "those layers' entries are not stored in the basis that FP8 is sculpted in",
            "use --kv-cache-dtype bfloat16, or whichever dtype the model has",
        ),
    ),
    Rule(
        lambda c: is_fp8(c) and bool(c.cache_config.kv_cache_dtype_skip_layers),
        Refusal(
            "layers that a quantised KV cache leaves out",
            "pages of all layers lie in the same blocks",
            "leave out --kv-cache-dtype-skip-layers",
        ),
    ),
    Rule(
        lambda c: is_fp8(c) and CompressionConfig.from_additional_config(c.additional_config).store != NO_STORE,
        Refusal(
            "a store of segments (--kv-compression-store) with a quantised KV cache",
            "what is stored does not say in which basis its entries are",
            "leave out one of them",
        ),
    ),
    Rule(
        _other_cache_dtype,
        Refusal(
            "a KV cache of another dtype than the model's",
            "queries are kept, and keys fitted to them, in the model's",
            "leave out --kv-cache-dtype",
        ),
    ),
)


def check_cache_dtype(config: VllmConfig) -> None:
    """Refuse what the KV cache's dtype is not compressed with, once the model is loaded: a checkpoint may have chosen
    FP8 by then, where nobody asked for another dtype.

    Raises:
        UnsupportedFeature: with every reason.
    """
    refuse(rule.refusal for rule in DTYPES if rule.found(config))


BLOCKS = (
    Rule(
        lambda c: requested_layout() not in (None, *LAYOUTS),
        Refusal(
            "the KV cache layout of VLLM_KV_CACHE_LAYOUT",
            "one head's entries of a block must lie together",
            f"set it to {' or '.join(LAYOUTS)}, or unset it",
        ),
    ),
    Rule(
        _block_size,
        Refusal(
            "this block size",
            "the attention kernel reads whole blocks",
            "use --block-size with a multiple of 32 on a CPU and of 16 on CUDA, or leave it out",
        ),
    ),
    Rule(
        _fine_prefix_match,
        Refusal("prefix-cache hits inside a block", "only whole blocks are compressed", "remove --prefix-match-unit"),
    ),
)
