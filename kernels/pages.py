"""Entries out of pages and into them: whole pages of the solver's, and the new tokens of a step.

A page of the GPU's cache holds ``block_size`` entries, each its key and then its value. Entry e of page p is element
``p · page_stride + e · entry_stride`` of the buffer, its value ``value_offset`` elements behind its key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsculpt_vllm.kernels.checks import check_head_size, check_tensors

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

FP8 = torch.float8_e4m3fn
"""Three bits of mantissa, the numbers of vLLM's `--kv-cache-dtype fp8`. Copies move it as it is."""

TILE = 2048
"""Elements of keys that a program of `store` takes."""


class Pages(NamedTuple):
    """The cache's one buffer and how to read it."""

    buffer: Tensor  # (pages, elements): a page holds block_size entries
    cell_pages: Tensor  # (L·H,) int64, see `paged_attention`
    block_stride: int  # pages between two blocks
    block_size: int
    entry_stride: int  # elements between the keys of two entries, and between their values
    value_offset: int  # elements between an entry's key and its value

    @property
    def arguments(self) -> tuple[Tensor | int, ...]:
        """What kernels take of it that find a block's pages by themselves, in their order."""
        strides = self.block_stride, self.entry_stride, self.value_offset
        return self.buffer, self.buffer.stride(0), self.cell_pages, *strides


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


def scatter_twin(pages: Pages, index: Tensor, keys: Tensor, values: Tensor) -> None:
    """See `scatter`."""
    entries = torch.arange(pages.block_size, device=index.device)[:, None] * pages.entry_stride
    at = entries + torch.arange(keys.shape[-1], device=index.device)  # (block_size, D)
    shape = (len(index), *at.shape)
    pages.buffer[index[:, None, None], at] = keys.view(shape)
    pages.buffer[index[:, None, None], at + pages.value_offset] = values.view(shape)


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


def store_twin(pages: Pages, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """See `store`."""
    num_heads, head_size = keys.shape[1:]
    d = torch.arange(head_size, device=slots.device)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, entry = divmod(slot, pages.block_size)
            page = block * pages.block_stride + pages.cell_pages[layer * num_heads : (layer + 1) * num_heads]
            at = entry * pages.entry_stride + d
            pages.buffer[page[:, None], at], pages.buffer[page[:, None], at + pages.value_offset] = keys[t], values[t]


def store(
    pages: Pages,
    layer: int,
    slots: Tensor,  # (S,) int64: block · block_size + entry, negative for a token that is padding
    keys: Tensor,  # (T, H, D) of at least S tokens
    values: Tensor,  # (T, H, D)
) -> None:
    """Write the first S tokens' entries of one layer, each into its slot of the (layer, head) pages.

    Raises:
        ValueError: a shape, dtype, device, stride or head size that does not fit.
    """
    tokens, num_heads, head_size = keys.shape
    _check(pages, slots, head_size)
    shape = (None, num_heads, head_size)
    check_tensors(pages.buffer, pages.buffer.dtype, keys=(keys, shape), values=(values, (tokens, *shape[1:])))
    if tokens < len(slots):
        raise ValueError(f"keys: {tokens} tokens given, {len(slots)} slots need as many")
    for name, tensor in (("keys", keys), ("values", values), ("slots", slots), ("cell_pages", pages.cell_pages)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: strides {tensor.stride()} given, the last must be 1")
    block_h, block_d = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_size)
    block_t = max(1, TILE // (block_h * block_d))
    _store[(triton.cdiv(len(slots), block_t),)](
        *pages.arguments,
        slots,
        *(keys, keys.stride(0), keys.stride(1)),
        *(values, values.stride(0), values.stride(1)),
        len(slots),
        layer,
        block_size=pages.block_size,
        num_heads=num_heads,
        head_size=head_size,
        block_t=block_t,
        block_h=block_h,
        block_d=block_d,
    )


def _check(pages: Pages, index: Tensor, head_size: int) -> None:
    check_head_size(head_size)
    check_tensors(pages.buffer, (*FLOATS, FP8), buffer=(pages.buffer, (None, None)))
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


@triton.jit(do_not_specialize=["tokens", "layer"])
def _store(
    buffer, page_stride, cell_pages, block_stride, entry_stride, value_offset,
    slots, keys, keys_t, keys_h, values, values_t, values_h, tokens, layer,
    block_size: tl.constexpr, num_heads: tl.constexpr, head_size: tl.constexpr,
    block_t: tl.constexpr, block_h: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    row, d = tl.arange(0, block_t * block_h), tl.arange(0, block_d)
    t, h = tl.program_id(0).to(tl.int64) * block_t + row // block_h, row % block_h
    slot = tl.load(slots + t, mask=t < tokens, other=-1)
    there = (slot >= 0) & (h < num_heads)
    page = slot // block_size * block_stride + tl.load(cell_pages + layer * num_heads + h, mask=there, other=0)
    at = (page * page_stride + slot % block_size * entry_stride)[:, None] + d[None, :]
    inside = there[:, None] & (d[None, :] < head_size)
    k = tl.load(keys + (t * keys_t + h * keys_h)[:, None] + d[None, :], mask=inside)
    v = tl.load(values + (t * values_t + h * values_h)[:, None] + d[None, :], mask=inside)
    tl.store(buffer + at, k, mask=inside)
    tl.store(buffer + at + value_offset, v, mask=inside)
