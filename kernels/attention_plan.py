"""Who computes what of a step's attention: made on the device, once a step for all layers, from the real lengths.

A row that decodes has, for each (layer, KV head), as many entries as its chain gave that head, and its tail. Budgets
differ between heads and rows between one another, so that one program for each would leave most processors waiting for
the longest. The entries of a layer are therefore cut into chunks of one size, the smallest with which all rows
together have no more than ``most`` full chunks::

    chunk = ⌈entries of all (row, head) / most⌉, rounded up to a multiple of TILE
    items = one a chunk, so Σ ⌈entries / chunk⌉ ≤ most + pairs

where a *pair* is a (row, KV head). Only chunks of pairs that have more than one leave a part to be merged: there are at
most 2 · most of those, of at most ``most`` pairs. So every array has a size that follows from the batch's shape, and
the plan can be part of a recorded CUDA graph.

What hangs on the row alone, its chain of segments, is walked here and nowhere else: a step along a chain waits for
memory three times, and an attention program would have to make all of them before its first entry.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsculpt_vllm.kernels.checks import check_tensors
from kvsculpt_vllm.kernels.pages import FLOATS, FP8, Pages

TILE = 64
"""Entries that the size of a chunk is a multiple of: those that a program multiplies at once."""

CHUNKS_PER_PROCESSOR = 8
"""Full chunks for each of a GPU's processors. Three programs of `decode_attention` run on one at a time, and those that
end early are followed by others. Fewer leave processors without work at the end; more must be merged (measured on an
H100: benchmarks/LOG.md)."""

ITEM = 4
"""Numbers that an item is written with: pair, number of its chunk, its part, nothing."""


class Prefixes(NamedTuple):
    """The directory's tensors: slot 0 stands for blocks that begin no segment, the null block too, and holds zeros."""

    slot_of_block: Tensor  # (blocks,) int64
    starts: Tensor  # (slots, L, H) int64, in cells
    lengths: Tensor  # (slots, L, H) int64, in pages
    span_blocks: Tensor  # (slots,) int64


class BatchRows(NamedTuple):
    """The rows of a step, and what the host knows of them. A recorded graph has rows with one token only."""

    block_table: Tensor  # (R, W) int32
    query_start_loc: Tensor  # (R + 1,) int32
    seq_lens: Tensor  # (R,) int32, tokens as vLLM counts them: what segments stand for included
    tiles: Tensor | None  # (n, 2) int32, of rows with several tokens, see `prefill_tiles`; None if there are none
    decode: bool  # whether there are rows with one token
    num_tokens: int  # of all rows, without padding


def prefill_tile(group: int) -> int:
    """Tokens of a row that a program of `prefill_attention` takes, whose KV heads have `group` query heads each."""
    return max(1, 64 // triton.next_power_of_2(group))


def prefill_tiles(query_start_loc: Tensor, group: int) -> Tensor:
    """The tiles (n, 2) int32 of rows with several tokens: each its row and its first token. All of it is on the host.

    `query_start_loc` is (R + 1,). The last tiles of a row see most, and come first.
    """
    begins, counts, size = query_start_loc[:-1].long(), query_start_loc.diff(), prefill_tile(group)
    tiles = torch.where(counts > 1, (counts + size - 1) // size, 0).long()
    rows = torch.arange(len(tiles)).repeat_interleave(tiles)
    number = torch.arange(len(rows)) - (tiles.cumsum(0) - tiles)[rows]
    return torch.stack([rows, begins[rows] + number * size], 1).flip(0).int()


class Plan(NamedTuple):
    """What a step's attention is made by; all int32."""

    chains: Tensor  # (R, W) each row's slots, in their order
    segments: Tensor  # (R,) how many
    counts: Tensor  # (L, 3) of each layer: items, entries of a chunk, pairs that have parts
    items: Tensor  # (L, most + pairs, ITEM) pair, number of its chunk, part or -1 if it has no other
    merges: Tensor  # (L, min(most, pairs), ITEM) pair, its first part, number of its parts
    most: int  # full chunks of a layer


def plan_attention(pages: Pages, prefixes: Prefixes, rows: BatchRows, most: int) -> Plan:
    """Walk all chains, and share the entries of rows with one token among programs, in no more than `most` full chunks
    a layer. It takes as much memory as the block table, and 16 bytes for each layer and item.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit, or fewer than one chunk.
    """
    _check(pages, prefixes, rows, most)
    table, query_start_loc = rows.block_table, rows.query_start_loc
    (num_rows, width), (_, layers, heads) = table.shape, prefixes.starts.shape
    pairs, new = num_rows * heads, table.new_empty
    plan = Plan(
        chains=new(num_rows, width),
        segments=new(num_rows),
        counts=new(layers, 3),
        items=new(layers, most + pairs, ITEM),
        merges=new(layers, min(most, pairs), ITEM),
        most=most,
    )
    entries = new(layers, pairs)
    _measure[(num_rows, layers)](
        prefixes.slot_of_block,
        prefixes.lengths,
        prefixes.span_blocks,
        table,
        table.stride(0),
        query_start_loc,
        rows.seq_lens,
        plan.chains,
        width,
        plan.segments,
        entries,
        num_rows,
        num_layers=layers,
        num_kv_heads=heads,
        block_size=pages.block_size,
        block_h=triton.next_power_of_2(heads),
        num_warps=1,
    )
    _share[(layers,)](entries, plan.counts, plan.items, plan.merges, pairs, most, tile=TILE, item=ITEM, block=512)
    return plan


def _check(pages: Pages, prefixes: Prefixes, rows: BatchRows, most: int) -> None:
    buffer, num_rows = pages.buffer, len(rows.seq_lens)
    slots, layers, heads = prefixes.starts.shape
    if most < 1:
        raise ValueError(f"most: {most} given, at least 1 is needed")
    check_tensors(buffer, (*FLOATS, FP8), buffer=(buffer, (None, None)))
    check_tensors(
        buffer,
        torch.int32,
        block_table=(rows.block_table, (num_rows, None)),
        query_start_loc=(rows.query_start_loc, (num_rows + 1,)),
        seq_lens=(rows.seq_lens, (num_rows,)),
    )
    if rows.tiles is not None:
        check_tensors(buffer, torch.int32, tiles=(rows.tiles, (None, 2)))
    check_tensors(
        buffer,
        torch.int64,
        cell_pages=(pages.cell_pages, (layers * heads,)),
        slot_of_block=(prefixes.slot_of_block, (None,)),
        starts=(prefixes.starts, (slots, layers, heads)),
        lengths=(prefixes.lengths, (slots, layers, heads)),
        span_blocks=(prefixes.span_blocks, (slots,)),
    )
    for name, tensor in (("buffer", buffer), ("block_table", rows.block_table)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: strides {tensor.stride()} given, the last must be 1")
    for name, tensor in (("cell_pages", pages.cell_pages), *zip(prefixes._fields, prefixes, strict=True)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")


@triton.jit(do_not_specialize=["table_stride", "width", "rows"])
def _measure(
    slot_of_block, lengths, span_blocks, block_table, table_stride, query_start_loc, seq_lens,
    chains, width, segments, entries, rows,
    num_layers: tl.constexpr, num_kv_heads: tl.constexpr, block_size: tl.constexpr, block_h: tl.constexpr,
):  # fmt: skip
    """A row's chain, and how many entries each KV head of one layer has to read for a row with one token."""
    r, layer = tl.program_id(0), tl.program_id(1)
    h = tl.arange(0, block_h)
    asked = tl.load(query_start_loc + r + 1) - tl.load(query_start_loc + r)
    length = tl.load(seq_lens + r)
    table, chain = block_table + r.to(tl.int64) * table_stride, chains + r.to(tl.int64) * width
    # A column beyond the row holds anything, as padding may: the null block stands for it, which begins nothing.
    column, number = 0, 0
    packed = tl.zeros((block_h,), tl.int32)
    slot = tl.load(slot_of_block + tl.load(table, mask=(asked > 0) & (length > 0), other=0))
    while slot > 0:
        if layer == 0:
            tl.store(chain + number, slot.to(tl.int32))
        of_layer = lengths + (slot * num_layers + layer) * num_kv_heads
        packed += tl.load(of_layer + h, mask=h < num_kv_heads, other=0).to(tl.int32)
        column += tl.load(span_blocks + slot).to(tl.int32)
        number += 1
        slot = tl.load(slot_of_block + tl.load(table + column, mask=column * block_size < length, other=0))
    if layer == 0:
        tl.store(segments + r, number)
    own = tl.where(asked == 1, (packed - column) * block_size + length, 0)
    tl.store(entries + (layer * rows + r) * num_kv_heads + h, own, mask=h < num_kv_heads)


@triton.jit(do_not_specialize=["pairs", "most"])
def _share(
    entries, counts, items, merges, pairs, most,
    tile: tl.constexpr, item: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One layer's chunks."""
    layer = tl.program_id(0)
    entries += layer * pairs
    items += layer * (most + pairs) * item
    merges += layer * tl.minimum(most, pairs) * item
    every = tl.full((), 0, tl.int64)
    for first in range(0, pairs, block):
        pair = first + tl.arange(0, block)
        every += tl.sum(tl.load(entries + pair, mask=pair < pairs, other=0).to(tl.int64), 0)
    chunk = ((every + most - 1) // most).to(tl.int32)
    chunk = tl.maximum(chunk + tile - 1, tile) // tile * tile
    items_before, parts_before, merges_before = 0, 0, 0
    for first in range(0, pairs, block):
        pair = first + tl.arange(0, block)
        chunks = (tl.load(entries + pair, mask=pair < pairs, other=0) + chunk - 1) // chunk
        split = chunks > 1
        parts = tl.where(split, chunks, 0)
        one = split.to(tl.int32)
        to_item = items + (items_before + tl.cumsum(chunks, 0) - chunks) * item
        to_merge = merges + (merges_before + tl.cumsum(one, 0) - one) * item
        part = parts_before + tl.cumsum(parts, 0) - parts
        tl.store(to_merge, pair, mask=split)
        tl.store(to_merge + 1, part, mask=split)
        tl.store(to_merge + 2, chunks, mask=split)
        for number in range(0, tl.max(chunks, 0)):
            there = number < chunks
            tl.store(to_item + number * item, pair, mask=there)
            tl.store(to_item + number * item + 1, number + tl.zeros_like(pair), mask=there)
            tl.store(to_item + number * item + 2, tl.where(split, part + number, -1), mask=there)
        items_before += tl.sum(chunks, 0)
        parts_before += tl.sum(parts, 0)
        merges_before += tl.sum(one, 0)
    tl.store(counts + layer * 3, items_before)
    tl.store(counts + layer * 3 + 1, chunk)
    tl.store(counts + layer * 3 + 2, merges_before)
