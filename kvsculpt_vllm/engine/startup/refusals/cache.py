"""The KV cache's dtype, layout and block size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import vllm.envs as envs
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from kvsculpt_vllm.engine.startup.refusals.refusal import Refusal, Rule

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


DTYPES = (
    Rule(
        lambda c: is_quantized_kv_cache(c.cache_config.cache_dtype),
        Refusal(
            "a quantised KV cache",
            "optimised keys and values have no scales to be stored with",
            "leave out --kv-cache-dtype",
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
