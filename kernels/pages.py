"""Entries out of pages and into them.

A page of the GPU's cache holds ``block_size`` entries, each its key and then its value. Entry e of page p is element
``p · page_stride + e · entry_stride`` of the buffer, its value ``value_offset`` elements behind its key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from kvsculpt_vllm.kernels.checks import check_head_size, check_tensors
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Pages(NamedTuple):
    """The cache's one buffer and how to read it."""

    buffer: Tensor  # (pages, elements): a page holds block_size entries
    cell_pages: Tensor  # (L·H,) int64, see `paged_attention`
    block_stride: int  # pages between two blocks
    block_size: int
    entry_stride: int  # elements between the keys of two entries, and between their values
    value_offset: int  # elements between an entry's key and its value


def gather_twin(pages: Pages, index: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """See `gather`."""
    entries = torch.arange(pages.block_size, device=index.device)[:, None] * pages.entry_stride
    at = entries + torch.arange(head_size, device=index.device)
    content = pages.buffer[index.flatten()]
    shape = (*index.shape[:-1], index.shape[-1] * pages.block_size, head_size)
    return content[:, at].view(shape), content[:, at + pages.value_offset].view(shape)


def gather(pages: Pages, index: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values (..., n · block_size, D) of the pages `index` (..., n) int64, in their order and dtype.

    Raises:
        ValueError: a dtype, device or head size that does not fit.
    """
    _check(pages, index, head_size)
    shape = (*index.shape[:-1], index.shape[-1] * pages.block_size, head_size)
    keys, values = pages.buffer.new_empty(shape), pages.buffer.new_empty(shape)
    _copy[(index.numel(),)](*_arguments(pages, index, keys, values, head_size), out_of_pages=True)
    return keys, values


def scatter(pages: Pages, index: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write keys and values (n · block_size, D) into the pages `index` (n,) int64, which must differ.

    Raises:
        ValueError: a shape, dtype, device or head size that does not fit.
    """
    head_size = keys.shape[-1]
    _check(pages, index, head_size)
    shape = (index.numel() * pages.block_size, head_size)
    check_tensors(pages.buffer, pages.buffer.dtype, keys=(keys, shape), values=(values, shape))
    _copy[(index.numel(),)](
        *_arguments(pages, index, keys.contiguous(), values.contiguous(), head_size), out_of_pages=False
    )


def _check(pages: Pages, index: Tensor, head_size: int) -> None:
    check_head_size(head_size)
    check_tensors(pages.buffer, FLOATS, buffer=(pages.buffer, (None, None)))
    if pages.buffer.stride(1) != 1:
        raise ValueError(f"buffer: strides {pages.buffer.stride()} given, the last must be 1")
    check_tensors(pages.buffer, torch.int64, index=(index, (None,) * index.dim()))


def _arguments(pages: Pages, index: Tensor, keys: Tensor, values: Tensor, head_size: int) -> tuple:
    sizes = pages.block_size, head_size, triton.next_power_of_2(pages.block_size), triton.next_power_of_2(head_size)
    layout = pages.buffer.stride(0), pages.entry_stride, pages.value_offset
    return pages.buffer, index.contiguous(), keys, values, *layout, *sizes


@triton.jit
def _copy(
    buffer, index, keys, values, page_stride, entry_stride, value_offset,
    block_size: tl.constexpr, head_size: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr,
    out_of_pages: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    e, d = tl.arange(0, block_n), tl.arange(0, block_d)
    inside = (e[:, None] < block_size) & (d[None, :] < head_size)
    there = buffer + tl.load(index + number) * page_stride + e[:, None] * entry_stride + d[None, :]
    here = (number * block_size + e[:, None]) * head_size + d[None, :]
    if out_of_pages:
        tl.store(keys + here, tl.load(there, mask=inside), mask=inside)
        tl.store(values + here, tl.load(there + value_offset, mask=inside), mask=inside)
    else:
        tl.store(there, tl.load(keys + here, mask=inside), mask=inside)
        tl.store(there + value_offset, tl.load(values + here, mask=inside), mask=inside)
