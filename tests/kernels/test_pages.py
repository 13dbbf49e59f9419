"""Entries through pages and back, with everything around poisoned."""

import pytest
import torch
from kvsculpt_vllm.kernels.pages import Pages, gather, gather_twin, scatter

BLOCK = 16


def make_pages(head_size, dtype, device, gap=0):
    """20 pages; with a gap, entries have elements between them that belong to nobody."""
    width = 2 * head_size + gap
    buffer = torch.full((20, BLOCK * width), torch.nan, dtype=dtype, device=device)
    return Pages(buffer, torch.zeros(1, dtype=torch.int64, device=device), 1, BLOCK, width, head_size)


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize(("head_size", "dtype"), [(64, torch.float32), (96, torch.bfloat16), (256, torch.float16)])
def test_what_is_scattered_is_gathered_and_nothing_else_is_touched(head_size, dtype, gap, device):
    pages = make_pages(head_size, dtype, device, gap)
    index = torch.tensor([7, 2, 19, 0], device=device)
    keys, values = (torch.randn(4 * BLOCK, head_size).to(dtype).to(device) for _ in range(2))
    scatter(pages, index, keys, values)
    assert int(pages.buffer.isnan().sum()) == pages.buffer.numel() - 8 * BLOCK * head_size
    for found in (gather(pages, index, head_size), gather_twin(pages, index, head_size)):
        assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    some = gather(pages, index.view(2, 2).flip(0), head_size)[0]
    assert torch.equal(some[0], keys[2 * BLOCK :]) and torch.equal(some[1], keys[: 2 * BLOCK])


def test_what_does_not_fit_is_named(device):
    pages, index = make_pages(64, torch.float32, device), torch.tensor([1, 2], device=device)
    keys = torch.zeros(2 * BLOCK, 64, device=device)
    with pytest.raises(ValueError, match=r"values: shape \(31, 64\) given, expected \(32, 64\)"):
        scatter(pages, index, keys, keys[1:])
    with pytest.raises(ValueError, match=r"keys: dtype torch\.float64 given"):
        scatter(pages, index, keys.double(), keys)
    with pytest.raises(ValueError, match=r"index: dtype torch\.int32 given"):
        gather(pages, index.int(), 64)
