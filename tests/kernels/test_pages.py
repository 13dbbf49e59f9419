"""Entries through pages and back, with everything around poisoned."""

import pytest
import torch

from kvsculpt_vllm.kernels.pages import FP8, Pages, gather, gather_twin, scatter, scatter_twin, store, store_twin

BLOCK = 16


def make_pages(head_size, dtype, device, gap=0):
    """20 pages; with a gap, entries have elements between them that belong to nobody."""
    width = 2 * head_size + gap
    buffer = torch.full((20, BLOCK * width), torch.nan, dtype=dtype, device=device)
    return Pages(buffer, torch.zeros(1, dtype=torch.int64, device=device), 1, BLOCK, width, head_size)


def same(one, other):
    """Equal and of one dtype; torch compares no FP8."""
    return one.dtype == other.dtype and torch.equal(one.float(), other.float())


@pytest.mark.parametrize("write", [scatter, scatter_twin])
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize(
    ("head_size", "dtype"), [(64, torch.float32), (96, torch.bfloat16), (256, torch.float16), (64, FP8)]
)
def test_what_is_scattered_is_gathered_and_nothing_else_is_touched(head_size, dtype, gap, write, device):
    pages = make_pages(head_size, dtype, device, gap)
    index = torch.tensor([7, 2, 19, 0], device=device)
    keys, values = (torch.randn(4 * BLOCK, head_size).to(dtype).to(device) for _ in range(2))
    write(pages, index, keys, values)
    assert int(pages.buffer.float().isnan().sum()) == pages.buffer.numel() - 8 * BLOCK * head_size
    for found in (gather(pages, index, head_size), gather_twin(pages, index, head_size)):
        assert same(found[0], keys) and same(found[1], values)
    some = gather(pages, index.view(2, 2).flip(0), head_size)[0]
    assert same(some[0], keys[2 * BLOCK :]) and same(some[1], keys[: 2 * BLOCK])


@pytest.mark.parametrize("write", [store, store_twin])
@pytest.mark.parametrize(
    ("num_heads", "head_size", "dtype"), [(3, 64, torch.float32), (1, 96, torch.bfloat16), (2, 64, FP8)]
)
@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
def test_a_steps_entries_go_to_their_slots_and_padding_nowhere(layout, num_heads, head_size, dtype, write, device):
    layers, blocks, layer = 2, 4, 1
    shape = (layers, blocks, num_heads) if layout == "LBHNC" else (blocks, layers, num_heads)
    pages = torch.arange(layers * blocks * num_heads).view(shape)
    by_block = pages.transpose(0, 1) if layout == "LBHNC" else pages  # (blocks, layers, heads)
    buffer = torch.full((pages.numel(), BLOCK * 2 * head_size), torch.nan, dtype=dtype, device=device)
    stride = int(by_block[1, 0, 0] - by_block[0, 0, 0])
    cache = Pages(buffer, by_block[0].reshape(-1).contiguous().to(device), stride, BLOCK, 2 * head_size, head_size)
    slots = torch.tensor([37, -1, 0, 63, 16], device=device)
    # As they come out of one projection: strided, and with a padded token more.
    keys, values = torch.randn(6, num_heads, 2 * head_size).to(dtype).to(device).split(head_size, dim=-1)
    write(cache, layer, slots, keys, values)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for head in range(num_heads):
                page = buffer[by_block[slot // BLOCK, layer, head]].view(BLOCK, 2, head_size)
                assert same(page[slot % BLOCK, 0], keys[token, head])
                assert same(page[slot % BLOCK, 1], values[token, head])
    assert int(buffer.float().isnan().sum()) == buffer.numel() - 4 * num_heads * 2 * head_size


def test_what_does_not_fit_is_named(device):
    pages, index = make_pages(64, torch.float32, device), torch.tensor([1, 2], device=device)
    keys = torch.zeros(2 * BLOCK, 64, device=device)
    with pytest.raises(ValueError, match=r"values: shape \(31, 64\) given, expected \(32, 64\)"):
        scatter(pages, index, keys, keys[1:])
    with pytest.raises(ValueError, match=r"keys: dtype torch\.float64 given"):
        scatter(pages, index, keys.double(), keys)
    with pytest.raises(ValueError, match=r"index: dtype torch\.int32 given"):
        gather(pages, index.int(), 64)
    with pytest.raises(ValueError, match=r"cell_pages: strides \(2,\) given"):
        store(pages._replace(cell_pages=index.repeat(2)[::2]), 0, index, keys[:, None], keys[:, None])
    with pytest.raises(ValueError, match="keys: 1 tokens given, 2 slots need as many"):
        store(pages, 0, index, keys[:1, None], keys[:1, None])
