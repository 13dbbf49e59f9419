"""What `benchmarks/kernels.py` measures: a shape, the cache of all layers, and a batch that decodes from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvsculpt_vllm.engine.worker.pages import PageGeometry, TokenPages
from kvsculpt_vllm.kernels.attention_plan import CHUNKS_PER_PROCESSOR, BatchRows, Plan, Prefixes, plan_attention
from kvsculpt_vllm.kernels.paged_attention import paged_attention
from kvsculpt_vllm.kernels.pages import Pages

WINDOW = 64  # prompt tokens that stay exact, as by default
LAYOUTS = ("LBHNC", "BLHNC")  # of the cache: layers outermost, or blocks


@dataclass(frozen=True)
class Shape:
    """A model's attention on one device."""

    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def entry_bytes(self) -> int:
        """Key and value of one entry, all KV heads of one layer."""
        return 2 * self.kv_heads * self.head_size * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """A block, all layers."""
        return self.layers * self.block_size * self.entry_bytes

    @property
    def timed_layer(self) -> int:
        """The layer whose attention is timed: one in the middle."""
        return self.layers // 2


@dataclass(frozen=True)
class Cache:
    """The KV cache of all layers."""

    view: Tensor  # of the timed layer, as vLLM has it: (blocks, KV heads, block_size, 2D)
    pages: Pages

    @classmethod
    def make(cls, shape: Shape, layout: str, buffer: Tensor) -> Cache:
        """The cache in one of `LAYOUTS` over `buffer` (elements,)."""
        block = shape.layers * shape.kv_heads * shape.block_size * 2 * shape.head_size
        blocks = len(buffer) // block
        page = (shape.kv_heads, shape.block_size, 2 * shape.head_size)
        order = (shape.layers, blocks) if layout == "LBHNC" else (blocks, shape.layers)
        views = list(buffer[: blocks * block].view(*order, *page).unbind(order.index(shape.layers)))
        geometry, pages = PageGeometry.of(views)
        return cls(views[shape.timed_layer], TokenPages(pages, geometry).kernel_pages)


@dataclass
class Case:
    """A decoding batch whose rows begin with a chain of segments; heads with unequal budgets, as adaptive ones are."""

    query: Tensor  # (rows, heads, D)
    prefixes: Prefixes
    block_table: Tensor
    starts: Tensor
    lens: Tensor
    entries: int  # of a row and KV head, mean

    @classmethod
    def make(cls, shape: Shape, tokens: int, rows: int, keep_ratio: float, segments: int) -> Case:
        """Keep ratio 1 is a batch that nothing was compressed of: empty chains."""
        size, heads, cells = shape.block_size, shape.kv_heads, shape.layers * shape.kv_heads
        blocks = math.ceil(tokens / size)
        span = 0 if keep_ratio == 1 else (tokens - WINDOW) // size
        spans = [span // segments + (i < span % segments) for i in range(segments)] if span else []
        packed = [math.ceil(keep_ratio * blocks) for blocks in spans]
        own = sum(packed) + blocks - span
        every = blocks_for(tokens, rows, shape)
        ids = (torch.randperm(every - 1)[: rows * own] + 1).view(rows, own).int()  # block 0 is the null block
        table = torch.zeros(rows, blocks, dtype=torch.int32)
        lengths = torch.tensor(packed, dtype=torch.int64)[:, None].repeat(1, cells)
        slots = torch.zeros(every, dtype=torch.int64)
        column = taken = 0
        for i, (stands_for, pages) in enumerate(zip(spans, packed, strict=True)):
            table[:, column : column + pages] = ids[:, taken : taken + pages]
            slots[table[:, column].long()] = torch.arange(rows) * len(spans) + i + 1
            # Of each pair of heads one gets half as much more, the other half less.
            more = min(pages // 2 if cells > 1 else 0, stands_for - pages)
            lengths[i, 0 : cells // 2 * 2 : 2] += more
            lengths[i, 1 : cells // 2 * 2 : 2] -= more
            column, taken = column + stands_for, taken + pages
        table[:, span:] = ids[:, taken:]
        by_layer = (-1, shape.layers, heads)

        def by_slot(of_segments: Tensor) -> Tensor:
            """Every row's segments have the same; slot 0 has zeros."""
            return torch.cat([of_segments.new_zeros(1, *of_segments.shape[1:]), *[of_segments] * rows])

        prefixes = Prefixes(
            slots,
            by_slot((lengths.cumsum(1) - lengths).view(by_layer)),
            by_slot(lengths.view(by_layer)),
            by_slot(torch.tensor(spans, dtype=torch.int64)),
        )
        device = shape.device
        generator = torch.Generator(device).manual_seed(0)
        query = (rows, shape.query_heads, shape.head_size)
        kept = lengths.view(by_layer)[:, shape.timed_layer].sum() / heads if spans else torch.tensor(0.0)
        return cls(
            torch.randn(query, generator=generator, device=device, dtype=shape.dtype),
            Prefixes(*(tensor.to(device) for tensor in prefixes)),
            table.to(device),
            torch.arange(rows + 1, dtype=torch.int32, device=device),
            torch.full((rows,), tokens, dtype=torch.int32, device=device),
            tokens - span * size + round(float(kept) * size),
        )

    def planned(self, cache: Cache) -> Plan:
        """What an engine computes once a step, for all layers."""
        processors = torch.cuda.get_device_properties(0).multi_processor_count if self.query.is_cuda else 4
        return plan_attention(cache.pages, self.prefixes, self.rows, CHUNKS_PER_PROCESSOR * processors)

    def attend(self, shape: Shape, cache: Cache, plan: Plan) -> Tensor:
        """Our kernel, as the backend calls it in each layer."""
        result = torch.empty_like(self.query)
        layer, scale = shape.timed_layer, shape.head_size**-0.5
        paged_attention(self.query, result, cache.pages, self.prefixes, self.rows, plan, layer, shape.kv_heads, scale)
        return result

    @property
    def rows(self) -> BatchRows:
        """The batch as kernels take it."""
        return BatchRows(self.block_table, self.starts, self.lens, None, True, len(self.query))

    def written_out(self, shape: Shape, cache: Cache, row: int) -> Tensor:
        """The row's answer (heads, D) from the entries taken one page list at a time, in float32."""
        size, group, answers = shape.block_size, shape.query_heads // shape.kv_heads, []
        table, length, layer = self.block_table[row].long(), int(self.lens[row]), shape.timed_layer
        cells = shape.layers * shape.kv_heads
        for head in range(shape.kv_heads):
            column, pages = 0, []
            while slot := int(self.prefixes.slot_of_block[table[column]]):
                start, count = (int(t[slot, layer, head]) for t in (self.prefixes.starts, self.prefixes.lengths))
                numbers = start + torch.arange(count, device=table.device)
                blocks = table[column + numbers // cells] * cache.pages.block_stride
                pages.append(blocks + cache.pages.cell_pages[numbers % cells])
                column += int(self.prefixes.span_blocks[slot])
            packed = sum(map(len, pages))
            own = cache.pages.cell_pages[layer * shape.kv_heads + head]
            index = torch.cat([*pages, table[column:] * cache.pages.block_stride + own])
            entries = cache.pages.buffer[index].view(len(index) * size, 2, shape.head_size)
            entries = entries[: packed * size + length - column * size].float()
            asked = self.query[row, head * group : (head + 1) * group].float()
            weights = (asked @ entries[:, 0].T * shape.head_size**-0.5).softmax(-1)
            answers.append(weights @ entries[:, 1])
        return torch.cat(answers)


def blocks_for(tokens: int, rows: int, shape: Shape) -> int:
    """Blocks of a cache that holds the batch uncompressed, and the null block."""
    return rows * math.ceil(tokens / shape.block_size) + 1
