"""Attention over a chain of packed prefixes and the tail behind it: a page list for each (row, KV head), read in place.

A row of the block table is walked piece by piece, from column 0 on. Where the row still has tokens and the column's
block begins a segment (it has a slot in the directory: the package's engine/worker/directory.py), that segment is a
piece, and the next one begins ``span_blocks[slot]`` columns further. What is left is the tail, which is a piece as
well. Page j of a piece, for KV head h of layer l, is ``cell = start + j · step``, counted from the piece's column on::

    segment: start = starts[slot, l, h],  step = 1
    tail:    start = l · heads + h,       step = cells
    block = block_table[r, column + cell // cells]
    page  = block · block_stride + cell_pages[cell % cells]

with ``cells`` = layers · heads, those of a block. Every new token sees all segments, and of the tail what is at its
position or before. A row without segments is a tail only: the same kernel, plain paged attention. Nothing of it is
computed on the host, so that it can be recorded in a CUDA graph.

A program takes some tokens of one row together with all query heads of one KV head, and one part of the entries; parts
are merged by their log-sum-exp (flash decoding).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsculpt_vllm.kernels.checks import check_head_size, check_tensors
from kvsculpt_vllm.kernels.pages import FLOATS, Pages

MOST_PARTS = 32
"""Programs that share one (row, KV head)'s entries, at most: what each of them writes is read again to merge it."""

ROWS = 16
"""The fewest rows that a matrix product's tile has: query heads of a group times tokens, padded."""


class Prefixes(NamedTuple):
    """The directory's tensors: slot 0 stands for blocks that begin no segment, the null block too, and holds zeros."""

    slot_of_block: Tensor  # (blocks,) int64
    starts: Tensor  # (slots, L, H) int64, in cells
    lengths: Tensor  # (slots, L, H) int64, in pages
    span_blocks: Tensor  # (slots,) int64


def paged_attention_twin(
    query: Tensor,
    pages: Pages,
    prefixes: Prefixes,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    layer: int,
    num_kv_heads: int,
    scale: float,
) -> Tensor:
    """Row by row, head by head, page by page; see `paged_attention`."""
    _, heads, head_size = query.shape
    out, group, size = torch.zeros_like(query), heads // num_kv_heads, pages.block_size
    for r, length in enumerate(seq_lens.tolist()):
        first, last = query_start_loc[r : r + 2].tolist()
        for h in range(num_kv_heads):
            key_rows, value_rows, positions = [], [], list[int]()
            for page, position, count in _row_pages(pages, prefixes, block_table[r], length, layer, h, num_kv_heads):
                content = pages.buffer[page]
                for at in range(0, count * pages.entry_stride, pages.entry_stride):
                    key_rows.append(content[at : at + head_size])
                    value_rows.append(content[at + pages.value_offset : at + pages.value_offset + head_size])
                positions += [-1] * size if position < 0 else range(position, position + count)
            keys, values = torch.stack(key_rows).double(), torch.stack(value_rows).double()
            for t in range(first, last):
                hidden = torch.tensor(positions) > length - (last - t)
                for g in range(h * group, (h + 1) * group):
                    logits = keys @ query[t, g].double() * scale
                    weights = logits.masked_fill(hidden.to(logits.device), -torch.inf).softmax(0)
                    out[t, g] = (weights @ values).to(out.dtype)
    return out


def _row_pages(
    pages: Pages, prefixes: Prefixes, row: Tensor, length: int, layer: int, head: int, num_kv_heads: int
) -> Iterator[tuple[int, int, int]]:
    """A row's pages for one KV head: index in the buffer, first token's position or -1 if packed, entries."""
    size, cells, column = pages.block_size, len(pages.cell_pages), 0
    while column * size < length and (slot := int(prefixes.slot_of_block[row[column]])):
        start = int(prefixes.starts[slot, layer, head])
        for number in range(start, start + int(prefixes.lengths[slot, layer, head])):
            block = int(row[column + number // cells])
            yield block * pages.block_stride + int(pages.cell_pages[number % cells]), -1, size
        column += int(prefixes.span_blocks[slot])
    own_page = int(pages.cell_pages[layer * num_kv_heads + head])
    for position in range(column * size, length, size):
        yield int(row[position // size]) * pages.block_stride + own_page, position, min(size, length - position)


def paged_attention(
    query: Tensor,  # (T, heads, D) of all rows, one after the other
    out: Tensor,  # (T, heads, D), written
    pages: Pages,
    prefixes: Prefixes,
    block_table: Tensor,  # (R, W) int32
    query_start_loc: Tensor,  # (R + 1,) int32
    seq_lens: Tensor,  # (R,) int32, tokens as vLLM counts them: what segments stand for included
    layer: int,
    num_kv_heads: int,
    scale: float,
    max_query_len: int,
    num_parts: int = 1,
) -> None:
    """Attend from `query` to the cache, which holds the new tokens' entries already.

    bfloat16, float16 and float32, the same for query, buffer and output; products accumulate in float32 (float32 input
    by three TF32 products). `num_parts` splits the entries of each head over programs, for few rows and long ones.

    Raises:
        ValueError: a shape, dtype, device, stride or head size that does not fit.
    """
    tokens, heads, head_size = query.shape
    rows = len(seq_lens)
    _check(query, out, pages, prefixes, block_table, query_start_loc, seq_lens, num_kv_heads)
    group = heads // num_kv_heads
    block_d = max(16, triton.next_power_of_2(head_size))
    # Tokens of one row that a program takes: one while decoding, more in a prefill.
    block_t = 1 if max_query_len == 1 else max(1, 64 // triton.next_power_of_2(group))
    block_rows = max(ROWS, triton.next_power_of_2(block_t * group))
    if num_parts == 1:
        parts, lse, strides = out, out, (out.stride(0), out.stride(1), 0)
    else:
        parts = query.new_empty(num_parts, tokens, heads, head_size, dtype=torch.float32)
        lse = query.new_empty(num_parts, tokens, heads, dtype=torch.float32)
        strides = (parts.stride(1), parts.stride(2), parts.stride(0))
    # A row with q tokens has at most q // block_t + 1 tiles; a program beyond them has nothing to do.
    tiles = tokens // block_t + rows
    _attend_pages[(tiles, num_kv_heads, num_parts)](
        query,
        query.stride(0),
        query.stride(1),
        parts,
        *strides,
        lse,
        pages.buffer,
        pages.buffer.stride(0),
        pages.cell_pages,
        pages.block_stride,
        pages.entry_stride,
        pages.value_offset,
        *prefixes,
        block_table,
        block_table.stride(0),
        query_start_loc,
        seq_lens,
        rows,
        layer,
        tokens,
        heads,
        scale,
        num_layers=prefixes.starts.shape[1],
        num_kv_heads=num_kv_heads,
        group=group,
        head_size=head_size,
        block_size=pages.block_size,
        in_parts=num_parts > 1,
        # Triton's interpreter would multiply bfloat16's bit patterns.
        widen=query.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
        block_t=block_t,
        block_rows=block_rows,
        block_n=64 if head_size <= 128 else 32,
        block_d=block_d,
        num_stages=1 if query.dtype == torch.float32 else 2,
    )
    if num_parts > 1:
        _merge[(tokens, heads)](
            parts,
            lse,
            out,
            out.stride(0),
            out.stride(1),
            tokens,
            heads,
            num_parts,
            head_size=head_size,
            block_d=block_d,
            block_parts=triton.next_power_of_2(num_parts),
        )


def parts_for(programs: int, processors: int) -> int:
    """Say over how many programs each (row, KV head)'s entries are split, so that every processor has two.

    It follows from the batch's shape alone, never from its lengths: in a recorded graph it is fixed.
    """
    return min(MOST_PARTS, max(1, 2 * processors // max(1, programs)))


@triton.jit
def _row_of(tile, query_start_loc, rows, block_t: tl.constexpr):
    """The row whose tiles include `tile`: row r's begin at query_start_loc[r] // block_t + r."""
    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // block_t + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["layer", "rows", "tokens"])
def _attend_pages(
    query, query_t, query_h,
    parts, parts_t, parts_h, parts_s,
    lse,
    buffer, page_stride, cell_pages, block_stride, entry_stride, value_offset,
    slot_of_block, starts, lengths, span_blocks,
    block_table, table_stride, query_start_loc, seq_lens,
    rows, layer, tokens, heads, scale,
    num_layers: tl.constexpr, num_kv_heads: tl.constexpr, group: tl.constexpr, head_size: tl.constexpr,
    block_size: tl.constexpr, in_parts: tl.constexpr, widen: tl.constexpr,
    block_t: tl.constexpr, block_rows: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    tile, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r = _row_of(tile, query_start_loc, rows, block_t)
    first_token, end_token = tl.load(query_start_loc + r), tl.load(query_start_loc + r + 1)
    begin = first_token + (tile - (first_token // block_t + r)) * block_t
    if begin < end_token:
        length = tl.load(seq_lens + r)
        table = block_table + r.to(tl.int64) * table_stride
        cells = num_layers * num_kv_heads
        own_cell = layer * num_kv_heads + h
        # The chain is walked for its entries, which the parts share, and once more to read them. A column beyond the
        # row holds anything: the null block stands for it, which begins no segment.
        segments, packed, tail = 0, 0, 0
        slot = tl.load(slot_of_block + tl.load(table))
        while slot > 0:
            segments += 1
            packed += tl.load(lengths + slot * cells + own_cell).to(tl.int32)
            tail += tl.load(span_blocks + slot).to(tl.int32)
            slot = tl.load(slot_of_block + tl.load(table + tail, mask=tail * block_size < length, other=0))

        row, d = tl.arange(0, block_rows), tl.arange(0, block_d)
        token, head = begin + row // group, h * group + row % group
        asks = (row < block_t * group) & (token < end_token)
        wide = d[None, :] < head_size
        at = token.to(tl.int64)[:, None] * query_t + head[:, None] * query_h + d[None, :]
        q = tl.load(query + at, mask=asks[:, None] & wide, other=0.0)
        if widen:
            q = q.to(tl.float32)

        total = packed * block_size + length - tail * block_size
        share = (total + tl.num_programs(2) - 1) // tl.num_programs(2)
        share = (share + block_n - 1) // block_n * block_n
        peak = tl.full((block_rows,), float("-inf"), tl.float32)
        mass = tl.zeros((block_rows,), tl.float32)
        summed = tl.zeros((block_rows, block_d), tl.float32)
        # Where a piece begins, and this part's entries, counted from the piece's first one on.
        column, first_entry, end_entry = 0, part * share, tl.minimum(total, (part + 1) * share)
        for piece in range(segments + 1):
            in_tail = piece == segments
            slot = tl.load(slot_of_block + tl.load(table + column, mask=piece < segments, other=0))  # tail: 0
            place = slot * cells + own_cell
            start = tl.where(in_tail, own_cell, tl.load(starts + place).to(tl.int32))
            step = tl.where(in_tail, cells, 1)
            entries = tl.where(in_tail, length - tail * block_size, tl.load(lengths + place).to(tl.int32) * block_size)
            seen = tl.where(in_tail, entries - end_token + token, entries)  # the last entry that each token sees
            end = tl.minimum(end_entry, entries)
            for first in range(tl.maximum(first_entry, 0), end, block_n):
                e = first + tl.arange(0, block_n)
                there = e < end
                cell = start + e // block_size * step
                block = tl.load(table + column + cell // cells, mask=there, other=0).to(tl.int64)
                page = block * block_stride + tl.load(cell_pages + cell % cells, mask=there, other=0)
                where = (page * page_stride + e % block_size * entry_stride)[:, None] + d[None, :]
                k = tl.load(buffer + where, mask=there[:, None] & wide, other=0.0)
                v = tl.load(buffer + where + value_offset, mask=there[:, None] & wide, other=0.0)
                if widen:
                    k, v = k.to(tl.float32), v.to(tl.float32)
                logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
                visible = there[None, :] & (e[None, :] <= seen[:, None])
                logits = tl.where(visible, logits, float("-inf"))
                higher = tl.maximum(peak, tl.max(logits, 1))
                # A row that has seen nothing yet has no peak to subtract.
                base = tl.where(higher == float("-inf"), 0.0, higher)
                shrink, w = tl.exp(peak - base), tl.exp(logits - base[:, None])
                mass = mass * shrink + tl.sum(w, 1)
                summed = summed * shrink[:, None] + tl.dot(w.to(v.dtype), v, input_precision="tf32x3")
                peak = higher
            column += tl.load(span_blocks + slot).to(tl.int32)
            first_entry -= entries
            end_entry -= entries
        result = summed / tl.where(mass > 0.0, mass, 1.0)[:, None]
        at = token.to(tl.int64)[:, None] * parts_t + head[:, None] * parts_h + d[None, :] + part.to(tl.int64) * parts_s
        tl.store(parts + at, result.to(parts.dtype.element_ty), mask=asks[:, None] & wide)
        if in_parts:
            # Nothing seen: log 0. The part then weighs nothing.
            answer = tl.where(mass > 0.0, peak + tl.log(tl.where(mass > 0.0, mass, 1.0)), float("-inf"))
            tl.store(lse + (part.to(tl.int64) * tokens + token) * heads + head, answer, mask=asks)


@triton.jit
def _merge(
    parts, lse, out, out_t, out_h, tokens, heads, num_parts,
    head_size: tl.constexpr, block_d: tl.constexpr, block_parts: tl.constexpr,
):  # fmt: skip
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, d = tl.arange(0, block_parts), tl.arange(0, block_d)
    there = part < num_parts
    at = (part.to(tl.int64) * tokens + t) * heads + head
    z = tl.load(lse + at, mask=there, other=float("-inf"))
    weights = tl.exp(z - tl.max(z, 0))
    inside = there[:, None] & (d[None, :] < head_size)
    each = tl.load(parts + at[:, None] * head_size + d[None, :], mask=inside, other=0.0)
    answer = tl.sum(weights[:, None] * each, 0) / tl.sum(weights, 0)
    tl.store(out + t * out_t + head * out_h + d, answer.to(out.dtype.element_ty), mask=d < head_size)


def _check(
    query: Tensor,
    out: Tensor,
    pages: Pages,
    prefixes: Prefixes,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    num_kv_heads: int,
) -> None:
    _, heads, head_size = query.shape
    rows = len(seq_lens)
    slots, layers = prefixes.starts.shape[:2]
    check_head_size(head_size)
    if heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: {num_kv_heads} given, {heads} query heads are not a multiple of it")
    check_tensors(query, FLOATS, query=(query, query.shape))
    check_tensors(query, query.dtype, out=(out, query.shape), buffer=(pages.buffer, (None, None)))
    check_tensors(
        query,
        torch.int32,
        block_table=(block_table, (rows, None)),
        query_start_loc=(query_start_loc, (rows + 1,)),
        seq_lens=(seq_lens, (rows,)),
    )
    by_head = (slots, layers, num_kv_heads)
    check_tensors(
        query,
        torch.int64,
        cell_pages=(pages.cell_pages, (layers * num_kv_heads,)),
        slot_of_block=(prefixes.slot_of_block, (None,)),
        starts=(prefixes.starts, by_head),
        lengths=(prefixes.lengths, by_head),
        span_blocks=(prefixes.span_blocks, (slots,)),
    )
    for name, tensor in (("query", query), ("out", out), ("buffer", pages.buffer), ("block_table", block_table)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: strides {tensor.stride()} given, the last must be 1")
    for name, tensor in (("cell_pages", pages.cell_pages), *zip(prefixes._fields, prefixes, strict=True)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")
