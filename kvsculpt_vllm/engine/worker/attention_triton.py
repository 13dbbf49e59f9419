"""The GPU attention backend: kernels for all rows, which find packed prefixes in the directory on the device.

A row without a packed prefix is the same kernel with an empty chain, in every batch. vLLM's own kernels are not used
beside it: a decode batch is replayed from a CUDA graph that must serve compressed rows too, a batch with a prefill has
them as well on a busy server, and so a row's result never depends on whether its neighbours are compressed.

The first layer makes the plan by which all of them attend. It is recorded in a graph with it, so that what is replayed
follows the rows as they are then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvsculpt_vllm.engine.shared.cache_dtype import IN_FP8
from kvsculpt_vllm.engine.worker.capture import CaptureRows
from kvsculpt_vllm.engine.worker.pages import TokenPages
from kvsculpt_vllm.kernels import checks
from kvsculpt_vllm.kernels.attention_plan import (
    CHUNKS_PER_PROCESSOR,
    BatchRows,
    Plan,
    plan_attention,
    prefill_tiles,
)
from kvsculpt_vllm.kernels.paged_attention import paged_attention
from kvsculpt_vllm.kernels.pages import Pages, store
from kvsculpt_vllm.sculpt.transfer import on_device

if TYPE_CHECKING:
    from kvsculpt_vllm.engine.worker.state import BoundLayer


@dataclass
class SculptMetadata(AttentionMetadata):
    """A batch. Its tensors are those that vLLM fills anew for every step: a recorded graph reads the current ones."""

    num_tokens: int  # padding included
    rows: BatchRows
    chunks: int  # full ones that a layer's entries are cut into, at most
    captures: list[CaptureRows]  # what to sample of this step's queries
    plan: Plan | None = None  # which the first layer makes


class SculptTritonBackend(AttentionBackend):
    """Plain causal attention of decoders, over keys and values of the model's dtype or in FP8."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *IN_FP8]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """The name that vLLM looks up."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SculptTritonImpl]:
        """The attention implementation."""
        return SculptTritonImpl

    @staticmethod
    def get_builder_cls() -> type[SculptTritonMetadataBuilder]:
        """The metadata builder."""
        return SculptTritonMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any multiple of 16, as in `refusals.cache.KERNEL_BLOCK_SIZE`."""
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether the kernel's tiles fit."""
        return head_size <= checks.MOST

    @classmethod
    def supports_sink(cls) -> bool:
        """Learned sinks are passed on to the kernel."""
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layouts in which a (block, layer, KV head) page is contiguous."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)


class SculptTritonMetadataBuilder(AttentionMetadataBuilder[SculptMetadata]):
    """Runs on the host at every step, also before a graph is replayed; what it returns then is not used."""

    # A graph does not run the Python that samples queries, so that prompts must not be computed in one.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        impl = layers[layer_names[0]].impl
        assert isinstance(impl, SculptTritonImpl)
        self._first_impl = impl
        self._chunks = CHUNKS_PER_PROCESSOR * current_platform.num_compute_units(device.index or 0)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SculptMetadata:
        """The batch, without waiting for the device."""
        common, bound = common_attn_metadata, self._first_impl.bound
        return SculptMetadata(
            num_tokens=common.num_actual_tokens,
            rows=self._rows(common),
            chunks=self._chunks,
            captures=bound.state.capture_rows(common) if bound is not None else [],
        )

    def _rows(self, common: CommonAttentionMetadata) -> BatchRows:
        """The rows, and what kinds of them there are: known on the host, where they were put together."""
        begins, tiles, decode = common.query_start_loc_cpu, None, True
        if common.max_query_len > 1:
            tiles = prefill_tiles(begins, self._first_impl.num_heads // self._first_impl.num_kv_heads)
            tiles = on_device(tiles, common.query_start_loc.device) if len(tiles) else None
            decode = bool((begins.diff() == 1).any())
        return BatchRows(
            common.block_table_tensor,
            common.query_start_loc,
            common.seq_lens,
            tiles,
            decode,
            int(begins[-1]),
        )


class SculptTritonImpl(AttentionImpl[SculptMetadata]):
    """Attention of one layer. The worker sets `bound` once there is a KV cache."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,  # (heads,)
    ) -> None:
        """See vLLM's `AttentionImpl`; what the kernel lacks is refused by `refusals.layers.check_attention_layers`."""
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.alibi_slopes, self.logits_soft_cap, self.sinks = alibi_slopes, logits_soft_cap, sinks
        self.bound: BoundLayer | None = None

    def do_kv_cache_update(
        self,
        layer: Any,
        key: Tensor,  # (T, KV heads, D)
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,  # (S,) int64, S ≤ T, -1 for padding
    ) -> None:
        """Write the step's keys and values into the tail's pages."""
        if (bound := self.bound) is not None:
            if (form := bound.state.cache_form) is not None:
                key, value = form.key_numbers(bound.index, key), form.value_numbers(value)
            store(_pages(bound), bound.index, slot_mapping, key, value)

    def forward(
        self,
        layer: Any,
        query: Tensor,  # (T, heads, D)
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SculptMetadata | None,
        output: Tensor,  # (T, heads, D), written
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend, sampling queries on the way."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("the output of attention cannot be quantised in its kernel")
        bound = self.bound
        if attn_metadata is None or bound is None:  # vLLM profiles its memory before there is a KV cache
            return output.zero_()
        for captured in attn_metadata.captures:
            captured.store(bound.index, query)
        pages, prefixes, rows = _pages(bound), bound.state.directory.prefixes, attn_metadata.rows
        if bound.index == 0:
            attn_metadata.plan = plan_attention(pages, prefixes, rows, attn_metadata.chunks)
        assert attn_metadata.plan is not None  # layers are computed in their order
        tokens = slice(attn_metadata.num_tokens)
        query, out, form = query[tokens], output.view(query.shape)[tokens], bound.state.cache_form
        answers = out if form is None else torch.empty_like(query, memory_format=torch.contiguous_format)
        paged_attention(
            query if form is None else form.turned(query),
            answers,
            pages,
            prefixes,
            rows,
            attn_metadata.plan,
            bound.index,
            self.num_kv_heads,
            self.scale,
            # Weights, in the model's dtype, which may be replaced while a server runs.
            None if self.sinks is None else self.sinks.float(),
            self.logits_soft_cap or 0.0,
        )
        if form is not None:
            out.copy_(form.turned(answers))
        return output


def _pages(bound: BoundLayer) -> Pages:
    """The cache's pages as the kernels take them."""
    pages = bound.state.pages
    assert isinstance(pages, TokenPages)  # as the worker of this backend says
    return pages.kernel_pages
