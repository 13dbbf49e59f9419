"""What the self-test is made on: a cache as vLLM views it, and the numbers that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvsculpt_vllm.engine.worker.pages import PageGeometry, TokenPages

END_BLOCKS = 12
"""Blocks at each end of the cache that are written: rows lie in both, so that the largest offsets are used."""


@dataclass(frozen=True)
class Subject:
    """A KV cache whose blocks at both ends hold nothing, and who reads it."""

    views: list[Tensor]  # of each layer, vLLM's own: (blocks, KV heads, block_size, 2D)
    geometry: PageGeometry
    pages: TokenPages
    num_query_heads: int
    table_columns: int  # of the block table that attention is given
    processors: int  # of the device, by which attention is cut into chunks
    soft_cap: float | None = None  # of the model's logits
    has_sinks: bool = False  # whether the model has learned sinks
    query_dtype: torch.dtype | None = None  # of queries where it is not the cache's

    @classmethod
    def of(
        cls,
        views: list[Tensor],
        num_query_heads: int,
        table_columns: int,
        processors: int,
        soft_cap: float | None = None,
        has_sinks: bool = False,
        query_dtype: torch.dtype | None = None,
    ) -> Subject:
        """The subject with this cache.

        Raises:
            ValueError: the views are not cells of one buffer with contiguous pages.
        """
        geometry, buffer = PageGeometry.of(views)
        pages = TokenPages(buffer, geometry)
        return cls(views, geometry, pages, num_query_heads, table_columns, processors, soft_cap, has_sinks, query_dtype)

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        return self.views[0].shape[0]

    @property
    def head_size(self) -> int:
        """Elements of a key."""
        return self.pages.head_size

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_query_heads // self.geometry.num_heads

    @property
    def scale(self) -> float:
        """The softmax scale. Kernels take any, without being compiled for it."""
        return self.head_size**-0.5

    @cached_property
    def sink_logits(self) -> Tensor | None:
        """Logits (query heads,) float32 of learned sinks that take a part of the softmax, another one of each head;
        None if the model has none. Kernels take any.
        """
        return torch.linspace(-1.0, 4.0, self.num_query_heads, device=self.device) if self.has_sinks else None

    @property
    def dtype(self) -> torch.dtype:
        """The queries'."""
        return self.query_dtype or self.cache_dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """The cache's."""
        return self.views[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self.views[0].device

    @property
    def end_layers(self) -> list[int]:
        """The first and the last layer."""
        return sorted({0, len(self.views) - 1})

    @cached_property
    def blocks(self) -> list[int]:
        """The blocks that may be written, ascending: those at both ends of the cache, the null block included."""
        every = range(self.num_blocks)
        return sorted({*every[:END_BLOCKS], *every[-END_BLOCKS:]})

    @cached_property
    def corners(self) -> list[int]:
        """Two blocks at each end of the cache, ascending: where page copies are looked at."""
        return sorted({*self.blocks[:2], *self.blocks[-2:]})

    @cached_property
    def _index(self) -> Tensor:
        return torch.tensor(self.blocks, device=self.device)

    def content(self) -> Tensor:
        """A copy of what `corners` hold: (L, corners, KV heads, block_size, 2D)."""
        index = torch.tensor(self.corners, device=self.device)
        return torch.stack([_bytes(view)[index] for view in self.views]).view(self.cache_dtype)

    def holds_something(self) -> bool:
        """Whether any of `blocks` is not empty."""
        return any(bool(_bytes(view)[self._index].any()) for view in self.views)

    def fill(self, generator: torch.Generator, null_block: bool = False) -> None:
        """Write random entries into all of `blocks`, whatever layout the cache has; into the null block on request."""
        index = self._index[0 if null_block else 1 :]
        shape = len(index), *self.views[0].shape[1:]
        entries = self.normal(*shape, generator=generator, dtype=self.cache_dtype)
        for layer, view in enumerate(self.views):
            _bytes(view)[index] = _bytes(entries).roll(layer, 0)  # drawing them anew for each layer would take seconds

    def clear(self) -> None:
        """Empty `blocks`."""
        for view in self.views:
            _bytes(view)[self._index] = 0

    def normal(self, *shape: int, generator: torch.Generator, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers, in the queries' dtype by default. Drawn on the host, they are the same on every device."""
        return torch.randn(*shape, generator=generator).to(self.device, dtype or self.dtype)

    def described(self) -> dict[str, int | str]:
        """What kernels are compiled for, for people."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            **({} if self.cache_dtype == self.dtype else {"cache": str(self.cache_dtype).removeprefix("torch.")}),
            "layers": len(self.views),
            "query_heads": self.num_query_heads,
            "kv_heads": self.geometry.num_heads,
            "head_size": self.head_size,
            "block_size": self.geometry.block_size,
            "blocks": self.num_blocks,
            "block_stride": self.geometry.block_stride,  # which tells the layout
            **({} if self.soft_cap is None else {"soft_cap": f"{self.soft_cap:g}"}),
            **({"sinks": "learned"} if self.has_sinks else {}),
        }


def _bytes(entries: Tensor) -> Tensor:
    """The same memory as bytes: much of what torch does on a GPU it does not do with FP8."""
    return entries.view(torch.uint8)
