"""Attention over page lists: against the twin that walks them entry by entry, in a buffer poisoned everywhere else."""

import pytest
import torch

from kvsculpt_vllm.kernels.paged_attention import Prefixes, paged_attention, paged_attention_twin
from kvsculpt_vllm.kernels.pages import Pages

LAYERS, BLOCK = 2, 16
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make_case(rows, kv_heads, group, head_size, dtype, device, layout="LBHNC", seed=0):
    """`rows`: (new tokens, tokens in all, span blocks or 0). Packed prefixes have their own number of pages a head."""
    generator = torch.Generator().manual_seed(seed)
    cells, num_blocks = LAYERS * kv_heads, 2 + sum(-(-tokens // BLOCK) + 3 for _, tokens, _ in rows)
    cell = torch.arange(cells)
    stride, cell_pages = (
        (cells, cell) if layout == "BLHNC" else (kv_heads, cell // kv_heads * num_blocks * kv_heads + cell % kv_heads)
    )
    buffer = torch.full((num_blocks * cells, BLOCK * 2 * head_size), torch.nan)
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()  # block 0 is the null block
    width = max(-(-tokens // BLOCK) for _, tokens, _ in rows) + 1
    table = torch.zeros(len(rows), width, dtype=torch.int32)
    slots = torch.zeros(num_blocks, dtype=torch.int64)
    starts, lengths = (torch.zeros(len(rows) + 1, LAYERS, kv_heads, dtype=torch.int64) for _ in range(2))
    spans = torch.zeros(len(rows) + 1, dtype=torch.int64)

    def fill(page, entries):
        content = torch.randn(entries, 2 * head_size, generator=generator)
        buffer[page].view(BLOCK, -1)[:entries] = content

    for r, (_, tokens, span) in enumerate(rows):
        if span:
            budgets = torch.randint(1, span + 1, (cells,), generator=generator)
            packed_blocks = -(-int(budgets.sum()) // cells)
            for column in range(packed_blocks):
                table[r, column] = free.pop()
            slots[table[r, 0]], spans[r + 1] = r + 1, span
            lengths[r + 1] = budgets.view(LAYERS, kv_heads)
            starts[r + 1] = (budgets.cumsum(0) - budgets).view(LAYERS, kv_heads)
            for number in range(int(budgets.sum())):
                fill(int(table[r, number // cells]) * stride + int(cell_pages[number % cells]), BLOCK)
        for column in range(span, -(-tokens // BLOCK)):
            table[r, column] = free.pop()
            for number in range(cells):
                fill(int(table[r, column]) * stride + int(cell_pages[number]), min(BLOCK, tokens - column * BLOCK))
    starts_of_rows = torch.tensor([0, *torch.tensor([new for new, _, _ in rows]).cumsum(0).tolist()], dtype=torch.int32)
    query = torch.randn(int(starts_of_rows[-1]), kv_heads * group, head_size, generator=generator)
    pages = Pages(buffer.to(dtype).to(device), cell_pages.to(device), stride, BLOCK, 2 * head_size, head_size)
    prefixes = Prefixes(*(tensor.to(device) for tensor in (slots, starts, lengths, spans)))
    lens = torch.tensor([tokens for _, tokens, _ in rows], dtype=torch.int32)
    tensors = [tensor.to(device) for tensor in (table, starts_of_rows, lens)]
    return query.to(dtype).to(device), pages, prefixes, tensors, max(new for new, _, _ in rows)


def check(query, pages, prefixes, tensors, longest, kv_heads, parts=1):
    head_size = query.shape[-1]
    for layer in range(LAYERS):
        wanted = paged_attention_twin(query, pages, prefixes, *tensors, layer, kv_heads, head_size**-0.5)
        around = torch.full((len(query) + 2, *query.shape[1:]), torch.nan, dtype=query.dtype, device=query.device)
        out = around[1:-1]
        arguments = query, out, pages, prefixes, *tensors, layer, kv_heads, head_size**-0.5, longest, parts
        paged_attention(*arguments)
        torch.testing.assert_close(out, wanted, rtol=0, atol=TOLERANCE[query.dtype])
        assert around[0].isnan().all() and around[-1].isnan().all()  # nothing written beside
        before = out.clone()
        paged_attention(*arguments)
        assert torch.equal(out, before)


DECODE = [(1, 70, 3), (1, 33, 0), (1, 1, 0), (1, 49, 3), (1, 111, 6)]
MIXED = [(5, 63, 2), (1, 40, 0), (23, 23, 0), (1, 65, 4)]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
def test_rows_with_and_without_a_prefix(rows, layout, parts, device):
    query, pages, prefixes, tensors, longest = make_case(rows, 2, 3, 64, torch.float32, device, layout)
    check(query, pages, prefixes, tensors, longest, 2, parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group", "head_size"), [(1, 128), (6, 96), (8, 64), (2, 256)])
def test_groups_head_sizes_and_dtypes(group, head_size, dtype, device):
    rows = [(1, 70, 3), (4, 33, 0)]
    query, pages, prefixes, tensors, longest = make_case(rows, 1, group, head_size, dtype, device)
    check(query, pages, prefixes, tensors, longest, 1, parts=2)


def test_what_does_not_fit_is_named(device):
    query, pages, prefixes, tensors, longest = make_case(DECODE, 2, 3, 64, torch.float32, device)

    def attend(query=query, pages=pages, kv_heads=2):
        paged_attention(query, torch.empty_like(query), pages, prefixes, *tensors, 0, kv_heads, 1.0, longest)

    with pytest.raises(ValueError, match=r"buffer: dtype torch\.float16 given"):
        attend(pages=pages._replace(buffer=pages.buffer.half()))
    with pytest.raises(ValueError, match="num_kv_heads: 4 given, 6 query heads"):
        attend(kv_heads=4)
    with pytest.raises(ValueError, match="query: strides"):
        attend(query=query.transpose(1, 2).contiguous().transpose(1, 2))
