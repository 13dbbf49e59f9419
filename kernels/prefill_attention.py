"""Attention of rows with several tokens: a program takes a tile of a row's tokens and all query heads of a KV head.

Which tiles there are is known on the host, as a batch with such rows is never part of a recorded graph. A program reads
all segments of the row's chain, and of the tail what its last token sees.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsculpt_vllm.kernels.attention_plan import prefill_tile
from kvsculpt_vllm.kernels.decode_attention import ROWS, Launch, logits_of, places, sink_of


def prefill_attention(
    query: Tensor,  # (T, heads, D)
    out: Tensor,  # (T, heads, D), written for the tiles' tokens
    launch: Launch,
    tiles: Tensor,  # (n, 2) int32, see `prefill_tiles`
) -> None:
    """Attend from the tokens of rows that have several; see `paged_attention`."""
    group, num_kv_heads = launch.constants["group"], launch.constants["num_kv_heads"]
    _attend[(len(tiles), num_kv_heads)](
        query,
        query.stride(0),
        query.stride(1),
        out,
        out.stride(0),
        out.stride(1),
        *launch.cache,
        tiles,
        *launch.rows,
        **launch.constants,
        **tiling(group, query.shape[2], query.dtype),
    )


def tiling(group: int, head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """The constants of a launch that say how large a tile is."""
    block_t = prefill_tile(group)
    return {
        "block_t": block_t,
        "block_rows": max(ROWS, triton.next_power_of_2(block_t * group)),
        "block_n": 64 if head_size <= 128 else 32,
        "block_d": max(16, triton.next_power_of_2(head_size)),
        "num_stages": 1 if dtype == torch.float32 else 2,
    }


@triton.jit(do_not_specialize=["chain_stride", "table_stride", "layer"])
def _attend(
    query, query_t, query_h, out, out_t, out_h,
    buffer, page_stride, cell_pages, block_stride, entry_stride, value_offset,
    starts, lengths, span_blocks, chains, chain_stride, segments, tiles,
    block_table, table_stride, query_start_loc, seq_lens, layer, sinks, scale,
    num_layers: tl.constexpr, num_kv_heads: tl.constexpr, group: tl.constexpr, head_size: tl.constexpr,
    block_size: tl.constexpr, cap: tl.constexpr, log2_e: tl.constexpr, widen: tl.constexpr,
    block_t: tl.constexpr, block_rows: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    tile, h = tl.program_id(0), tl.program_id(1)
    r, begin = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    end_token, length, num_segments = tl.load(query_start_loc + r + 1), tl.load(seq_lens + r), tl.load(segments + r)
    table, chain = block_table + r.to(tl.int64) * table_stride, chains + r.to(tl.int64) * chain_stride
    cells: tl.constexpr = num_layers * num_kv_heads
    own_cell = layer * num_kv_heads + h

    row, d, n = tl.arange(0, block_rows), tl.arange(0, block_d), tl.arange(0, block_n)
    token, head = begin + row // group, h * group + row % group
    wide = d[None, :] < head_size
    asks = ((row < block_t * group) & (token < end_token))[:, None] & wide
    asked = token.to(tl.int64)[:, None] * query_t + head[:, None] * query_h + d[None, :]
    q = tl.load(query + asked, mask=asks, other=0.0)
    if widen:
        q = q.to(tl.float32)
    peak, mass = sink_of(sinks, head, row < block_t * group, log2_e)
    summed = tl.zeros((block_rows, block_d), tl.float32)
    column = 0
    for piece in range(num_segments + 1):
        in_tail = piece == num_segments
        slot = tl.load(chain + piece, mask=piece < num_segments, other=0).to(tl.int64)  # of the tail: 0
        place = slot * cells + own_cell
        start = tl.where(in_tail, own_cell, tl.load(starts + place).to(tl.int32))
        step = tl.where(in_tail, cells, 1)
        packed = tl.load(lengths + place).to(tl.int32) * block_size
        # The last entry that each token sees, and the end of those that any token here does.
        shift = length - column * block_size - end_token
        seen = tl.where(in_tail, shift + token, packed)
        end = tl.where(in_tail, shift + tl.minimum(begin + block_t, end_token), packed)
        own_table = table + column
        where = places(
            n, end, start, step, own_table, cell_pages, block_stride, page_stride, entry_stride, cells, block_size
        )
        for first in range(0, end, block_n):
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
            logits = tl.where(there[None, :] & (e[None, :] <= seen[:, None]), logits, float("-inf"))
            higher = tl.maximum(peak, tl.max(logits, 1))  # finite: every token sees the first entry there is
            shrink, w = tl.exp2(peak - higher), tl.exp2(logits - higher[:, None])
            mass = mass * shrink + tl.sum(w, 1)
            summed = summed * shrink[:, None] + tl.dot(w.to(v.dtype), v, input_precision="tf32x3")
            peak = higher
        column += tl.load(span_blocks + slot).to(tl.int32)
    result = summed / mass[:, None]
    at = token.to(tl.int64)[:, None] * out_t + head[:, None] * out_h + d[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=asks)
