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

Rows that decode and rows with several tokens have launches of their own (`decode_attention`, `prefill_attention`), in
one batch too: what shares a long row's entries among programs would be lost on the others. Which programs those are
says the plan (`attention_plan`), which is made once a step.

Logits are ``scale · q·k``, or ``c · tanh(scale · q·k / c)`` with a soft cap c (Gemma 2, arXiv 2408.00118). With sink
logits, one of each query head is another term of the softmax's denominator and has no value (gpt-oss, arXiv
2508.10925).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvsculpt_vllm.kernels.attention_plan import BatchRows, Plan, Prefixes
from kvsculpt_vllm.kernels.checks import check_head_size, check_tensors
from kvsculpt_vllm.kernels.decode_attention import decode_attention, launch_of
from kvsculpt_vllm.kernels.pages import FLOATS, FP8, Pages
from kvsculpt_vllm.kernels.prefill_attention import prefill_attention


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
    sink_logits: Tensor | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    """Row by row, head by head, page by page; see `paged_attention`."""
    _, heads, head_size = query.shape
    out, group, size = torch.zeros_like(query), heads // num_kv_heads, pages.block_size
    for r, length in enumerate(seq_lens.tolist()):
        first, last = query_start_loc[r : r + 2].tolist()
        for h in range(num_kv_heads):
            key_rows, value_rows, positions = [], [], list[int]()
            for page, position, count in _row_pages(pages, prefixes, block_table[r], length, layer, h, num_kv_heads):
                content = pages.buffer[page].double()
                for at in range(0, count * pages.entry_stride, pages.entry_stride):
                    key_rows.append(content[at : at + head_size])
                    value_rows.append(content[at + pages.value_offset : at + pages.value_offset + head_size])
                positions += [-1] * size if position < 0 else range(position, position + count)
            keys, values = torch.stack(key_rows), torch.stack(value_rows)
            for t in range(first, last):
                hidden = torch.tensor(positions) > length - (last - t)
                for g in range(h * group, (h + 1) * group):
                    logits = keys @ query[t, g].double() * scale
                    if soft_cap:
                        logits = soft_cap * (logits / soft_cap).tanh()
                    logits = logits.masked_fill(hidden.to(logits.device), -torch.inf)
                    if sink_logits is not None:
                        logits = torch.cat([logits, sink_logits[g : g + 1].double()])
                    out[t, g] = (logits.softmax(0)[: len(values)] @ values).to(out.dtype)
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
    query: Tensor,  # (T, heads, D) of all rows, one after the other, and of padding behind them
    out: Tensor,  # (T, heads, D), written: 0 for padding
    pages: Pages,
    prefixes: Prefixes,
    rows: BatchRows,
    plan: Plan,  # of these rows, see `plan_attention`, which checks what does not change from layer to layer
    layer: int,
    num_kv_heads: int,
    scale: float,
    sink_logits: Tensor | None = None,  # (heads,) float32
    soft_cap: float = 0.0,  # 0 for none
) -> None:
    """Attend from `query` to the cache, which holds the new tokens' entries already.

    bfloat16, float16 and float32, the same for query, buffer and output; products accumulate in float32 (float32 input
    by three TF32 products). The buffer may be float8_e4m3fn with any of them, which holds every one of its numbers
    exactly: what a scale or another basis makes of them is the caller's business.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit, or a cap below 0.
    """
    dtypes = FLOATS if pages.buffer.dtype == FP8 else pages.buffer.dtype
    check_tensors(pages.buffer, dtypes, query=(query, (None,) * 3))
    check_tensors(pages.buffer, query.dtype, out=(out, query.shape))
    _, heads, head_size = query.shape
    check_head_size(head_size)
    if heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: {num_kv_heads} given, {heads} query heads are not a multiple of it")
    for name, tensor in (("query", query), ("out", out)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: strides {tensor.stride()} given, the last must be 1")
    if sink_logits is not None:
        check_tensors(query, torch.float32, sink_logits=(sink_logits, (heads,)))
        sink_logits = sink_logits.contiguous()
    if not 0.0 <= soft_cap < math.inf:
        raise ValueError(f"soft_cap: {soft_cap} given, at least 0 is needed")
    launch = launch_of(query, pages, prefixes, plan, rows, layer, num_kv_heads, scale, sink_logits, soft_cap)
    if rows.tiles is not None:
        prefill_attention(query, out, launch, rows.tiles)
    if rows.decode:
        decode_attention(query, out, launch, plan, rows, layer)
    elif rows.num_tokens < len(out):
        out[rows.num_tokens :].zero_()
