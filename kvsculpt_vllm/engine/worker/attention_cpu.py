"""The CPU attention backend: stock kernels, fed one page list per (layer, row, KV head) where rows are compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvsculpt_vllm.engine.compat.worker import use_plain_vector_pages
from kvsculpt_vllm.engine.startup.refusals.refusal import Refusal, UnsupportedFeature
from kvsculpt_vllm.engine.worker.capture import CaptureRows
from kvsculpt_vllm.engine.worker.pages import VectorPages, page_lists
from kvsculpt_vllm.engine.worker.softmax import have_sinks

if TYPE_CHECKING:
    from kvsculpt_vllm.engine.worker.state import BoundLayer, CompressionState

READABLE_ISAS = ("vec", "vec16")
"""Kernel variants whose page content `VectorPages` reads and writes."""


@dataclass
class PackedBatch:
    """The compressed rows of a batch, each (KV head, row) being a sequence with one KV head. Sequence = h · R + r.

    One call of the kernel is for all sequences. Where query heads have learned sinks it is for the rows of one KV head:
    the kernel takes one sink for each of a sequence's query heads, and those of every KV head are others.

    Rows without a packed prefix go through the stock path beside them, so that they get exactly the tokens that
    stock vLLM gives: the kernel's tiling, and with it the rounding, depends on the number of heads.
    """

    tokens: Tensor  # (T,) indices of these rows' tokens in the batch
    plain: CPUAttentionMetadata | None  # stock metadata of the other rows, if there are any
    plain_tokens: Tensor  # their tokens
    calls: int  # of the kernel in every layer: 1, or H
    query_start_loc: Tensor  # (H·R / calls + 1,) int32: of any call, for all KV heads have the same rows
    page_lists: Tensor  # (L, H·R, P) int32
    lengths: Tensor  # (L, H·R) int32
    scheduler_metadata: list[list[Tensor]]  # per layer and call: work split of the kernel, which depends on the lengths


@dataclass
class SculptCPUMetadata(CPUAttentionMetadata):
    """Stock metadata, plus what to sample of this step's queries and how to read packed prefixes."""

    captures: list[CaptureRows] = field(default_factory=list)
    packed: PackedBatch | None = None  # None: no row is compressed, the stock path runs


class SculptCPUBackend(CPUAttentionBackend):
    """The stock CPU backend with page lists per KV head. It keeps the stock name, which vLLM looks up."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layouts in which a (block, layer, KV head) page is contiguous; the stock one comes first."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @staticmethod
    def get_impl_cls() -> type[SculptCPUImpl]:
        """The attention implementation."""
        return SculptCPUImpl

    @staticmethod
    def get_builder_cls() -> type[SculptCPUMetadataBuilder]:
        """The metadata builder."""
        return SculptCPUMetadataBuilder


class SculptCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Adds the packed view of a batch to the stock metadata, once per step for all layers."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        use_plain_vector_pages(self, layer_names)
        if self.isa not in READABLE_ISAS:
            cause = f"pages of the CPU kernels {', '.join(READABLE_ISAS)} are read, and this machine uses {self.isa!r}"
            raise UnsupportedFeature([Refusal("this processor", cause, "run it on an x86 machine")])
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        impls = [impl for name in layer_names if isinstance(impl := layers[name].impl, SculptCPUImpl)]
        assert len(impls) == len(layer_names)
        self._first_impl = impls[0]
        self._has_sinks = have_sinks(impls)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SculptCPUMetadata:
        """Stock metadata, extended."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = SculptCPUMetadata(**vars(stock))
        if (bound := self._first_impl.bound) is not None:
            metadata.captures = bound.state.capture_rows(common_attn_metadata)
            metadata.packed = self._pack(bound.state, metadata)
        return metadata

    def _pack(self, state: CompressionState, batch: SculptCPUMetadata) -> PackedBatch | None:
        if batch.block_table.shape[0] == 0:
            return None
        row_blocks = (batch.seq_lens + state.geometry.block_size - 1) // state.geometry.block_size
        chains = state.directory.chains(batch.block_table, row_blocks)
        if chains is None:
            return None
        row_lengths = batch.query_start_loc.diff()
        is_packed = chains.span_blocks[:, 0] > 0
        token_is_packed = is_packed.repeat_interleave(row_lengths)
        rows, plain_rows = is_packed.nonzero()[:, 0], (~is_packed).nonzero()[:, 0]
        pages, lengths = page_lists(state.geometry, batch.block_table[rows], batch.seq_lens[rows], chains.of(rows))
        num_layers, num_heads, num_rows = lengths.shape
        calls = num_heads if self._has_sinks else 1
        query_start_loc = _starts(row_lengths[rows].repeat(num_heads // calls))
        lengths = lengths.view(num_layers, num_heads * num_rows)
        return PackedBatch(
            tokens=token_is_packed.nonzero()[:, 0],
            plain=self._rows(batch, plain_rows, row_lengths[plain_rows]) if len(plain_rows) else None,
            plain_tokens=(~token_is_packed).nonzero()[:, 0],
            calls=calls,
            query_start_loc=query_start_loc,
            page_lists=pages.view(num_layers, num_heads * num_rows, -1),
            lengths=lengths,
            scheduler_metadata=[
                [
                    self._split_work(self.num_heads // num_heads, 1, own, query_start_loc)
                    for own in of_layer.chunk(calls)
                ]
                for of_layer in lengths
            ],
        )

    def _rows(self, batch: SculptCPUMetadata, rows: Tensor, row_lengths: Tensor) -> CPUAttentionMetadata:
        """Stock metadata of some rows of a batch."""
        query_start_loc, seq_lens = _starts(row_lengths), batch.seq_lens[rows]
        return CPUAttentionMetadata(
            num_actual_tokens=int(query_start_loc[-1]),
            max_query_len=batch.max_query_len,
            query_start_loc=query_start_loc,
            max_seq_len=batch.max_seq_len,
            seq_lens=seq_lens,
            block_table=batch.block_table[rows],
            slot_mapping=batch.slot_mapping,
            scheduler_metadata=self._split_work(self.num_heads, self.num_kv_heads, seq_lens, query_start_loc),
            causal=True,
        )

    def _split_work(self, num_heads: int, num_kv_heads: int, seq_lens: Tensor, query_start_loc: Tensor) -> Tensor:
        """The stock kernel's division of labour among threads."""
        assert isinstance(self.dtype, torch.dtype)  # and no name any more: vLLM has resolved it
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )


class SculptCPUImpl(CPUAttentionBackendImpl):
    """Stock attention; rows with a packed prefix are read through page lists. The worker sets `bound`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bound: BoundLayer | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,  # (T, heads, D)
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend, sampling queries on the way; see the stock implementation for shapes."""
        if isinstance(attn_metadata, SculptCPUMetadata) and (bound := self.bound) is not None:
            for rows in attn_metadata.captures:
                rows.store(bound.index, query)
            if (packed := attn_metadata.packed) is not None:
                if packed.plain is not None:
                    plain_query = query[packed.plain_tokens]
                    plain_output = torch.empty_like(plain_query)
                    super().forward(layer, plain_query, key, value, kv_cache, packed.plain, plain_output)
                    _by_token(output, query)[packed.plain_tokens] = plain_output
                _by_token(output, query)[packed.tokens] = self._attend_packed(bound, query[packed.tokens], packed)
                return output
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )

    def _attend_packed(self, bound: BoundLayer, query: Tensor, batch: PackedBatch) -> Tensor:
        """The stock kernel on (KV head, row) sequences: head-major queries, one KV head, any page of the buffer."""
        shape = (len(query), self.num_kv_heads, self.num_queries_per_kv, self.head_size)
        by_head = query.view(shape).transpose(0, 1).reshape(-1, *shape[2:])
        result = torch.empty_like(by_head)
        pages = bound.state.pages
        assert isinstance(pages, VectorPages)  # as the worker of this backend says
        keys, values = pages.kernel_views
        of_layer = by_head, result, batch.lengths[bound.index], batch.page_lists[bound.index]
        each_call = zip(
            *(tensor.chunk(batch.calls) for tensor in of_layer),
            batch.scheduler_metadata[bound.index],
            self._sinks_of(batch.calls),
            strict=True,
        )
        for asked, answer, lengths, own_pages, scheduler_metadata, sinks in each_call:
            ops.cpu_attention_with_kv_cache(
                query=asked,
                key_cache=keys,
                value_cache=values,
                output=answer,
                query_start_loc=batch.query_start_loc,
                seq_lens=lengths,
                scale=self.scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=own_pages,
                softcap=self.logits_soft_cap,
                scheduler_metadata=scheduler_metadata,
                s_aux=sinks,
            )
        return result.view(shape[1], shape[0], *shape[2:]).transpose(0, 1).reshape(query.shape)

    def _sinks_of(self, calls: int) -> Sequence[Tensor | None]:
        """Logits of the learned sinks for each call of the kernel, None for a layer without them."""
        if self.sinks is None:
            return [None] * calls
        # The kernel takes these two dtypes; vLLM, too, casts others.
        sinks = self.sinks if self.sinks.dtype in (torch.bfloat16, torch.float32) else self.sinks.float()
        return sinks.chunk(calls)


def _by_token(output: Tensor, query: Tensor) -> Tensor:
    """`output` with the shape (T, heads, D) of `query`; vLLM may pass it flat."""
    return output.view(query.shape)


def _starts(lengths: Tensor) -> Tensor:
    """Start offsets (n + 1,) int32 of consecutive pieces of `lengths` (n,)."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
