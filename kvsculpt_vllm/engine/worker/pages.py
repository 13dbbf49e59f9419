"""Pages: where they are in the cache's one buffer, what is inside, and how a packed prefix is laid out in them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsculpt_vllm.kernels import pages as kernel
from kvsculpt_vllm.kernels.dispatch import use_triton
from kvsculpt_vllm.sculpt.storage import in_fp8
from kvsculpt_vllm.sculpt.turned import hadamard

if TYPE_CHECKING:
    from kvsculpt_vllm.engine.worker.directory import Chains


@dataclass(frozen=True)
class PageGeometry:
    """Page indices in the buffer that all layers share: ``block * block_stride + cell_pages[cell]``.

    A block has one cell per (layer, KV head), numbered ``layer * num_heads + head``. Strides come from the layers'
    real views (never from a shape: two KV heads look like K and V), so any layout in which a page is contiguous works.
    """

    num_layers: int
    num_heads: int
    block_size: int
    block_stride: int
    cell_pages: Tensor  # (L·H,) int64

    @property
    def num_cells(self) -> int:
        """Cells of a block."""
        return self.num_layers * self.num_heads

    @classmethod
    def of(cls, layer_views: list[Tensor]) -> tuple[PageGeometry, Tensor]:
        """The geometry of per-layer views (blocks, heads, block_size, 2D), and the buffer as (pages, 2 · N · D).

        Raises:
            ValueError: the views are not cells of one buffer with contiguous pages.
        """
        first = layer_views[0]
        _, num_heads, block_size, width = first.shape
        page = block_size * width
        storage = first.untyped_storage()
        block_stride, head_stride = first.stride(0), first.stride(1)
        for view in layer_views:
            if (
                view.untyped_storage().data_ptr() != storage.data_ptr()
                or view.shape != first.shape
                or view.stride() != (block_stride, head_stride, width, 1)
                or any(offset % page for offset in (view.storage_offset(), block_stride, head_stride))
            ):
                raise ValueError(
                    "the KV cache is not one buffer of contiguous (block, layer, KV head) pages: "
                    f"shape {tuple(view.shape)}, strides {view.stride()}, offset {view.storage_offset()}; "
                    "use the layout LBHNC or BLHNC"
                )
        offsets = torch.tensor([view.storage_offset() // page for view in layer_views], device=first.device)
        heads = torch.arange(num_heads, device=first.device) * (head_stride // page)
        num_pages = storage.nbytes() // first.element_size() // page
        buffer = first.as_strided((num_pages, page), (page, 1), storage_offset=0)
        geometry = cls(
            len(layer_views),
            num_heads,
            block_size,
            block_stride // page,
            (offsets[:, None] + heads[None, :]).flatten(),
        )
        return geometry, buffer

    def block_pages(self, blocks: Tensor) -> Tensor:
        """Pages of `blocks` (n,), in (L, H, n)."""
        return (self.cell_pages[:, None] + blocks[None, :] * self.block_stride).view(
            self.num_layers, self.num_heads, -1
        )

    def packed_pages(self, packed_blocks: Tensor) -> Tensor:
        """All pages of a packed prefix's blocks (k,), in the order in which `place` counts them: (k · L · H,)."""
        return (packed_blocks[:, None] * self.block_stride + self.cell_pages[None, :]).flatten()


def place(pages: list[int]) -> list[int]:
    """First cell of each (layer, head)'s pages when they are packed one after the other."""
    return [0, *accumulate(pages[:-1])]


def page_lists(
    geometry: PageGeometry,
    block_table: Tensor,  # (R, W) int, rows padded with anything valid
    seq_lens: Tensor,  # (R,) tokens of each row, as vLLM counts them
    chains: Chains,
) -> tuple[Tensor, Tensor]:
    """One page list and length for every (layer, KV head, row): the packed pages of all segments, then the tail's.

    A segment's page j is cell ``start + j``, counted in cells of (L·H) a block from its own column on. The tail is one
    piece more: its pages are ``L·H`` cells apart. Segments fill whole pages, so that all pieces are one list.

    Returns:
        pages (L, H, R, P) int32, padded with page 0 of the null block's kind (never read), and entry counts
        (L, H, R) int32.
    """
    size, cells = geometry.block_size, geometry.num_cells
    device, shape = block_table.device, (len(seq_lens), geometry.num_layers, geometry.num_heads)
    pad = torch.nn.functional.pad
    columns = pad(chains.span_blocks.cumsum(1), (1, 0))  # (R, S + 1): where the pieces begin
    first = pad(chains.lengths.cumsum(1).permute(0, 2, 3, 1), (1, 0))  # (R, L, H, S + 1): their first pages
    packed, tail_tokens = first[..., -1], (seq_lens.long() - columns[:, -1] * size)[:, None, None]
    total = packed + (tail_tokens + size - 1) // size
    number = torch.arange(int(total.max()), device=device).expand(*shape, -1).contiguous()  # (R, L, H, P)
    piece = torch.searchsorted(first[..., 1:].contiguous(), number, right=True)
    own_cell = torch.arange(cells, device=device).view(1, *shape[1:], 1).expand(*shape, 1)
    starts = torch.cat([chains.starts.permute(0, 2, 3, 1), own_cell], -1) + columns[:, None, None] * cells
    step = torch.tensor([1] * (columns.shape[1] - 1) + [cells], device=device)
    cell = (starts - first * step).gather(-1, piece) + number * step[piece]  # counted from the row's first column on
    row = torch.arange(len(seq_lens), device=device)[:, None, None, None]
    column = (cell // cells).clamp_max(block_table.shape[1] - 1)
    pages = block_table[row, column].long() * geometry.block_stride + geometry.cell_pages[cell % cells]
    pages = pages.masked_fill(number >= total.unsqueeze(-1), 0)
    counts = packed * size + tail_tokens
    return pages.permute(1, 2, 0, 3).to(torch.int32).contiguous(), counts.permute(1, 2, 0).to(torch.int32).contiguous()


class VectorPages:
    """Page content of vLLM's CPU `vec` and `vec16` kernels: keys transposed ``D × N``, then values ``N × D``."""

    def __init__(self, buffer: Tensor, geometry: PageGeometry) -> None:
        """`buffer` is (pages, 2 · N · D) in the cache's dtype."""
        self.buffer, self.block_size = buffer, geometry.block_size
        self.head_size = buffer.shape[1] // (2 * self.block_size)

    @property
    def kernel_views(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all pages (pages, 1, N, D) as the stock kernel wants them."""
        keys, values = self.buffer.view(-1, 1, 2 * self.block_size, self.head_size).chunk(2, dim=2)
        return keys, values

    def read(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., n · N, D) of pages (..., n)."""
        content = self.buffer[pages].unflatten(-1, (2, self.block_size * self.head_size))
        keys = content[..., 0, :].unflatten(-1, (self.head_size, self.block_size)).transpose(-1, -2)
        values = content[..., 1, :].unflatten(-1, (self.block_size, self.head_size))
        return keys.flatten(-3, -2), values.flatten(-3, -2)

    def write(self, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill pages (n,) with keys and values (n · N, D), in the cache's dtype."""
        keys = keys.unflatten(0, (-1, self.block_size)).transpose(1, 2).flatten(1)
        values = values.unflatten(0, (-1, self.block_size)).flatten(1)
        self.buffer[pages] = torch.cat([keys, values], dim=1)


class TokenPages:
    """Page content of vLLM's GPU kernels: token by token, each its key and then its value."""

    def __init__(self, buffer: Tensor, geometry: PageGeometry) -> None:
        """`buffer` is (pages, N · 2 · D) in the cache's dtype. Entries of FP8 are read and written in float32, and are
        in the cache as `cache_form` says.
        """
        width = buffer.shape[1] // geometry.block_size
        self.buffer, self.head_size = buffer, width // 2
        self._turn = hadamard(self.head_size).to(buffer.device) if buffer.dtype == kernel.FP8 else None
        self.kernel_pages = kernel.Pages(
            buffer=buffer,
            cell_pages=geometry.cell_pages,
            block_stride=geometry.block_stride,
            block_size=geometry.block_size,
            entry_stride=width,
            value_offset=self.head_size,
        )

    def read(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., n · N, D) of pages (..., n)."""
        keys, values = self.numbers(pages)
        return (keys, values) if self._turn is None else (self._decoded(keys), self._decoded(values))

    def write(self, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill pages (n,) with keys and values (n · N, D), in the dtype that they are read in."""
        if self._turn is not None:
            keys, values = (in_fp8(entries.float() @ self._turn) for entries in (keys, values))
        self.write_numbers(pages, keys, values)

    def _decoded(self, numbers: Tensor) -> Tensor:
        """The entries (..., D) that numbers in the cache are. A layer at a time: of a large model all of them would be
        there twice.
        """
        assert self._turn is not None
        entries = torch.empty(numbers.shape, dtype=torch.float32, device=numbers.device)
        for own, coded in zip(entries, numbers, strict=True) if numbers.dim() > 2 else [(entries, numbers)]:
            torch.matmul(coded.float(), self._turn, out=own)
        return entries

    def numbers(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., n · N, D) of pages (..., n) as they are in the cache."""
        gather = kernel.gather if use_triton(self.buffer) else kernel.gather_twin
        return gather(self.kernel_pages, pages, self.head_size)

    def write_numbers(self, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill pages (n,) with keys and values (n · N, D), in the cache's dtype and as they are to be in it."""
        scatter = kernel.scatter if use_triton(self.buffer) else kernel.scatter_twin
        scatter(self.kernel_pages, pages, keys, values)


PageFormat = type[VectorPages] | type[TokenPages]
