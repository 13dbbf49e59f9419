"""The KV cache's groups, as vLLM makes them of a model's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvsculpt_vllm.engine.shared.groups import full_group
from kvsculpt_vllm.engine.startup.refusals.cache import LAYOUTS
from kvsculpt_vllm.engine.startup.refusals.refusal import OTHER_MODEL, Refusal, UnsupportedFeature, refuse

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


def check_kv_cache_config(config: KVCacheConfig) -> None:
    """Refuse a KV cache that is not one group of plain full attention, with or without groups of windows beside it.

    Raises:
        UnsupportedFeature: as soon as a page is anything but `[block_size, K|V]` of one head.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, SlidingWindowSpec

    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    if not specs:
        refuse([Refusal("0 KV cache groups", "there is nothing to compress", OTHER_MODEL)])
    spec = specs.pop(full_group(config.kv_cache_groups))
    if others := [other for other in specs if type(other) is not SlidingWindowSpec]:
        count, kinds = len(others) + 1, ", ".join(sorted({type(other).__name__ for other in (spec, *others)}))
        cause = "compression rewrites the blocks of one group, and leaves alone those of windows"
        refuse([Refusal(f"{count} KV cache groups ({kinds})", cause, OTHER_MODEL)])
    if any((other.block_size, other.page_size_bytes) != (spec.block_size, spec.page_size_bytes) for other in specs):
        cause = "a packed block and one of a window take each other's place"
        refuse([Refusal("KV cache groups with blocks of several sizes", cause, OTHER_MODEL)])
    if type(spec) is not FullAttentionSpec:
        raise UnsupportedFeature(
            [Refusal(type(spec).__name__, "only plain full attention can be compressed", OTHER_MODEL)]
        )
    plain = FullAttentionSpec(
        block_size=spec.block_size, num_kv_heads=spec.num_kv_heads, head_size=spec.head_size, dtype=spec.dtype
    )
    # They say how requests share the cache among ranks and what it is aligned to, not what is in a page.
    # `is_draft` (vLLM 0.33) names a drafter's layers; speculative decoding has a refusal of its own.
    free = {"dcp_sharded", "max_tp_shards", "block_stride_alignment", "is_draft"}
    if spec.kv_quant_mode == KVQuantMode.FP8_PER_TENSOR:  # bytes, which the worker takes for FP8
        free |= {"kv_quant_mode"}
    odd = [
        name for name in plain.__dataclass_fields__ if name not in free and getattr(spec, name) != getattr(plain, name)
    ]
    if odd:
        values = ", ".join(f"{name}={getattr(spec, name)}" for name in odd)
        refuse([Refusal(f"a KV cache with {values}", "pages must hold plain keys and values", OTHER_MODEL)])
    if config.kv_cache_layout not in (None, *LAYOUTS):
        cure = f"set VLLM_KV_CACHE_LAYOUT to {' or '.join(LAYOUTS)}"
        refuse([Refusal(f"layout {config.kv_cache_layout}", "one head's entries of a block must lie together", cure)])
