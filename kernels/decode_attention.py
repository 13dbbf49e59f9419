"""Attention of rows with one token: a program takes a chunk of one (row, KV head)'s entries, for all its query heads.

Which chunk says the plan (`attention_plan`). A chunk goes from one segment of the row's chain into the next and into
the tail; of each piece the entries are read in tiles, and the addresses of a tile are computed while the tile before it
is multiplied, so that the copies of two tiles are on their way at any time. What several chunks found of a pair is
merged by their log-sum-exp (flash decoding); logarithms are to the base 2, in which a GPU computes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsculpt_vllm.kernels.attention_plan import ITEM, BatchRows, Plan, Prefixes
from kvsculpt_vllm.kernels.pages import Pages
from kvsculpt_vllm.kernels.soft_cap import cap_tile

ROWS = 16
"""The fewest rows that a matrix product's tile has: the query heads of a group, padded."""

LOG2_E = 1.4426950408889634


class Launch(NamedTuple):
    """Arguments that the kernels of decoding and of prefill both take, in their order."""

    cache: tuple[Tensor | int, ...]  # the pages, the directory, and the chains of the plan
    rows: tuple[Tensor | int | float | None, ...]
    constants: dict[str, Any]


def launch_of(
    query: Tensor,
    pages: Pages,
    prefixes: Prefixes,
    plan: Plan,
    rows: BatchRows,
    layer: int,
    num_kv_heads: int,
    scale: float,
    sink_logits: Tensor | None,
    soft_cap: float,
) -> Launch:
    """Put together what both kernels take of the arguments of `paged_attention`, which checks them."""
    _, heads, head_size = query.shape
    return Launch(
        (
            *pages.arguments,
            prefixes.starts,
            prefixes.lengths,
            prefixes.span_blocks,
            plan.chains,
            plan.chains.stride(0),
            plan.segments,
        ),
        (
            rows.block_table,
            rows.block_table.stride(0),
            rows.query_start_loc,
            rows.seq_lens,
            layer,
            sink_logits,
            scale * LOG2_E,  # logits are to the base 2
        ),
        {
            "cap": soft_cap * LOG2_E or None,
            "log2_e": LOG2_E,
            "num_layers": prefixes.starts.shape[1],
            "num_kv_heads": num_kv_heads,
            "group": heads // num_kv_heads,
            "head_size": head_size,
            "block_size": pages.block_size,
            # Triton's interpreter would multiply bfloat16's bit patterns.
            "widen": query.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
        },
    )


def decode_attention(
    query: Tensor,  # (T, heads, D)
    out: Tensor,  # (T, heads, D), written for rows with one token, and 0 for tokens behind the last row's
    launch: Launch,
    plan: Plan,
    rows: BatchRows,
    layer: int,
) -> None:
    """Attend from the tokens of rows that have one; see `paged_attention`."""
    tokens, _, head_size = query.shape
    group, num_kv_heads = launch.constants["group"], launch.constants["num_kv_heads"]
    block_d = max(16, triton.next_power_of_2(head_size))
    parts = query.new_empty(2 * plan.most, group, head_size, dtype=torch.float32)
    lse = query.new_empty(2 * plan.most, group, dtype=torch.float32)
    _attend[(plan.items.shape[1],)](
        query,
        query.stride(0),
        query.stride(1),
        out,
        out.stride(0),
        out.stride(1),
        parts,
        lse,
        *launch.cache,
        plan.counts,
        plan.items,
        plan.items.shape[1],
        *launch.rows,
        item=ITEM,
        block_rows=max(ROWS, triton.next_power_of_2(group)),
        block_d=block_d,
        **launch.constants,
        **tiling(head_size, query.dtype),
    )
    _merge[(plan.merges.shape[1], group)](
        parts,
        lse,
        out,
        out.stride(0),
        out.stride(1),
        plan.counts,
        plan.merges,
        plan.merges.shape[1],
        rows.query_start_loc,
        len(rows.seq_lens),
        layer,
        tokens,
        num_kv_heads=num_kv_heads,
        group=group,
        head_size=head_size,
        item=ITEM,
        block_parts=16,
        block_d=block_d,
    )


def tiling(head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Entries of a tile, and how many tiles are in shared memory at once or on the way there."""
    if dtype == torch.float32:
        return {"block_n": 32, "num_stages": 2}
    return {"block_n": 64 if head_size <= 128 else 32, "num_stages": 3}


@triton.jit
def logits_of(q, k, scale, cap: tl.constexpr):
    """Products times `scale`, under a soft cap if the model has one."""
    return cap_tile(tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale, cap)


@triton.jit
def sink_of(sinks, heads, there, log2_e: tl.constexpr):
    """Peak and mass of what has no entry: the sink's logit to the base 2 and 1, or nothing where there is none."""
    peak = tl.full(heads.shape, float("-inf"), tl.float32)
    if sinks is not None:
        peak = tl.load(sinks + heads, mask=there, other=float("-inf")) * log2_e
    return peak, tl.where(peak == float("-inf"), 0.0, 1.0)


@triton.jit
def places(
    e, end, start, step, table, cell_pages, block_stride, page_stride, entry_stride,
    cells: tl.constexpr, block_size: tl.constexpr,
):  # fmt: skip
    """Where a piece's entries `e` before `end` are in the buffer; `table` is the piece's part of the block table."""
    there = e < end
    cell = start + e // block_size * step
    block = tl.load(table + cell // cells, mask=there, other=0)
    page = block * block_stride + tl.load(cell_pages + cell % cells, mask=there, other=0).to(tl.int32)
    return page.to(tl.int64) * page_stride + e % block_size * entry_stride


@triton.jit(do_not_specialize=["chain_stride", "most_items", "table_stride", "layer"])
def _attend(
    query, query_t, query_h, out, out_t, out_h, parts, lse,
    buffer, page_stride, cell_pages, block_stride, entry_stride, value_offset,
    starts, lengths, span_blocks, chains, chain_stride, segments, counts, items, most_items,
    block_table, table_stride, query_start_loc, seq_lens, layer, sinks, scale,
    num_layers: tl.constexpr, num_kv_heads: tl.constexpr, group: tl.constexpr, head_size: tl.constexpr,
    block_size: tl.constexpr, cap: tl.constexpr, log2_e: tl.constexpr, widen: tl.constexpr, item: tl.constexpr,
    block_rows: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    if number < tl.load(counts + layer * 3):
        own = items + (layer * most_items + number) * item
        pair, place_of_chunk, part = tl.load(own), tl.load(own + 1), tl.load(own + 2)
        chunk = tl.load(counts + layer * 3 + 1)
        first_entry = place_of_chunk * chunk
        end_entry = first_entry + chunk
        r, h = pair // num_kv_heads, pair % num_kv_heads
        cells: tl.constexpr = num_layers * num_kv_heads
        own_cell = layer * num_kv_heads + h
        token, length, num_segments = tl.load(query_start_loc + r), tl.load(seq_lens + r), tl.load(segments + r)
        table, chain = block_table + r.to(tl.int64) * table_stride, chains + r.to(tl.int64) * chain_stride

        # The piece that the chunk begins in: its number, its column, and the entries before it.
        piece, column, before, counted = 0, 0, 0, 0
        for first in range(0, num_segments, 32):
            s = first + tl.arange(0, 32)
            slot = tl.load(chain + s, mask=s < num_segments, other=0).to(tl.int64)
            entries = tl.load(lengths + slot * cells + own_cell).to(tl.int32) * block_size
            passed = (counted + tl.cumsum(entries, 0) <= first_entry) & (s < num_segments)
            piece += tl.sum(passed.to(tl.int32), 0)
            column += tl.sum(tl.where(passed, tl.load(span_blocks + slot).to(tl.int32), 0), 0)
            before += tl.sum(tl.where(passed, entries, 0), 0)
            counted += tl.sum(entries, 0)

        row, d, n = tl.arange(0, block_rows), tl.arange(0, block_d), tl.arange(0, block_n)
        head = h * group + row
        asks = (row[:, None] < group) & (d[None, :] < head_size)
        wide = d[None, :] < head_size
        q = tl.load(query + token.to(tl.int64) * query_t + head[:, None] * query_h + d[None, :], mask=asks, other=0.0)
        if widen:
            q = q.to(tl.float32)
        # A sink counts in the first chunk, and not in others.
        peak, mass = sink_of(sinks, head, row < tl.where(place_of_chunk == 0, group, 0), log2_e)
        summed = tl.zeros((block_rows, block_d), tl.float32)
        while (piece <= num_segments) & (before < end_entry):
            in_tail = piece == num_segments
            slot = tl.load(chain + piece, mask=piece < num_segments, other=0).to(tl.int64)  # of the tail: 0
            place = slot * cells + own_cell
            start = tl.where(in_tail, own_cell, tl.load(starts + place).to(tl.int32))
            step = tl.where(in_tail, cells, 1)
            packed = tl.load(lengths + place).to(tl.int32)
            entries = tl.where(in_tail, length - column * block_size, packed * block_size)
            begin, end = tl.maximum(first_entry - before, 0), tl.minimum(end_entry - before, entries)
            own_table = table + column
            where = places(
                begin + n, end, start, step, own_table, cell_pages, block_stride, page_stride, entry_stride,
                cells, block_size,
            )  # fmt: skip
            for first in range(begin, end, block_n):
                e = first + n
                there = e < end
                at = where[:, None] + d[None, :]
                where = places(
                    e + block_n, end, start, step, own_table, cell_pages, block_stride, page_stride, entry_stride,
                    cells, block_size,
                )  # fmt: skip
                k = tl.load(buffer + at, mask=there[:, None] & wide, other=0.0)
                v = tl.load(buffer + at + value_offset, mask=there[:, None] & wide, other=0.0)
                k, v = k.to(q.dtype), v.to(q.dtype)  # of a cache in FP8, and for the interpreter
                logits = logits_of(q, k, scale, cap)
                logits = tl.where(there[None, :], logits, float("-inf"))
                higher = tl.maximum(peak, tl.max(logits, 1))  # finite: a tile has an entry
                shrink, w = tl.exp2(peak - higher), tl.exp2(logits - higher[:, None])
                mass = mass * shrink + tl.sum(w, 1)
                summed = summed * shrink[:, None] + tl.dot(w.to(v.dtype), v, input_precision="tf32x3")
                peak = higher
            column += tl.load(span_blocks + slot).to(tl.int32)
            before += entries
            piece += 1
        result = summed / mass[:, None]
        if part < 0:
            at = token.to(tl.int64) * out_t + head[:, None] * out_h + d[None, :]
            tl.store(out + at, result.to(out.dtype.element_ty), mask=asks)
        else:
            to = part * group + row
            tl.store(parts + to[:, None] * head_size + d[None, :], result, mask=asks)
            tl.store(lse + to, peak + tl.log2(mass), mask=row < group)


@triton.jit(do_not_specialize=["most_merges", "rows", "layer", "tokens"])
def _merge(
    parts, lse, out, out_t, out_h, counts, merges, most_merges, query_start_loc, rows, layer, tokens,
    num_kv_heads: tl.constexpr, group: tl.constexpr, head_size: tl.constexpr, item: tl.constexpr,
    block_parts: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    number, member, d = tl.program_id(0), tl.program_id(1), tl.arange(0, block_d)
    if number < tl.load(counts + layer * 3 + 2):
        own = merges + (layer * most_merges + number) * item
        pair, first_part, num_parts = tl.load(own), tl.load(own + 1), tl.load(own + 2)
        peak = tl.full((), float("-inf"), tl.float32)
        mass = tl.full((), 0.0, tl.float32)
        summed = tl.zeros((block_d,), tl.float32)
        for first in range(0, num_parts, block_parts):
            part = first + tl.arange(0, block_parts)
            at = (first_part + part) * group + member
            there = part < num_parts
            z = tl.load(lse + at, mask=there, other=float("-inf"))
            inside = there[:, None] & (d[None, :] < head_size)
            each = tl.load(parts + at[:, None] * head_size + d[None, :], mask=inside, other=0.0)
            higher = tl.maximum(peak, tl.max(z, 0))
            shrink, w = tl.exp2(peak - higher), tl.exp2(z - higher)
            mass = mass * shrink + tl.sum(w, 0)
            summed = summed * shrink + tl.sum(w[:, None] * each, 0)
            peak = higher
        token, head = tl.load(query_start_loc + pair // num_kv_heads), pair % num_kv_heads * group + member
        at = token.to(tl.int64) * out_t + head * out_h + d
        tl.store(out + at, (summed / mass).to(out.dtype.element_ty), mask=d < head_size)
    # A recorded graph's tokens that are padding are computed on, too: with something that is a number.
    zeros = tl.zeros((block_d,), out.dtype.element_ty)
    token = tl.load(query_start_loc + rows) + number
    while token < tokens:
        for h in range(num_kv_heads):
            at = token.to(tl.int64) * out_t + (h * group + member) * out_h + d
            tl.store(out + at, zeros, mask=d < head_size)
        token += tl.num_programs(0)
