"""Segments between their pages and the store: read out when they are made, written into blocks when they are found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillReading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.logger import init_logger

from kvsculpt_vllm.engine.shared.commands import LoadCommand
from kvsculpt_vllm.engine.shared.stores import PATIENCE_SECONDS
from kvsculpt_vllm.engine.worker import pages as page_layout
from kvsculpt_vllm.engine.worker.pages import PageGeometry
from kvsculpt_vllm.store.background import BackgroundStore, StoreAway
from kvsculpt_vllm.store.file import StoredSegment
from kvsculpt_vllm.store.names import StoredName
from kvsculpt_vllm.store.store import Store
from kvsculpt_vllm.store.unusable import Unusable

if TYPE_CHECKING:
    from kvsculpt_vllm.engine.worker.state import CompressionState

logger = init_logger("vllm.kvsculpt")

SLICE_BYTES = 16 << 20
"""Of a segment, written between two looks at the clock."""
NAP_SECONDS = 0.02
"""For how long a step that nobody else waits for waits for a file."""


@dataclass
class Loading:
    """A load in hand, of one rank."""

    command: LoadCommand
    files: list[Future[StoredSegment]]
    since: float = field(default_factory=time.monotonic)
    written: int = 0  # segments, of the first ones
    under_way: Iterator[None] | None = None  # the next one, being written
    outcome: int | None = None  # segments that this rank could read, once it is through


def _cells(
    geometry: PageGeometry, blocks: list[int], starts: list[int], lengths: list[int], device: torch.device
) -> Tensor:
    """Pages of a segment's entries, those of each (layer, head) together, layers outermost: as a file has them."""
    cells = geometry.packed_pages(torch.tensor(blocks, device=device))
    return torch.cat([cells[start : start + length] for start, length in zip(starts, lengths, strict=True)])


def _read(name: StoredName, rank: int, ranks: int, store: Store) -> StoredSegment:
    return store.read(name, rank, ranks)


class StoredSegments:
    """The store as one rank's worker uses it."""

    def __init__(
        self, state: CompressionState, store: BackgroundStore, rank: int, ranks: int, about: dict[str, str]
    ) -> None:
        """`about` is what a file says of who wrote it."""
        self.state, self.store, self.rank, self.ranks, self.about = state, store, rank, ranks, about

    def begin(self, command: LoadCommand) -> Loading:
        """Have the files read."""
        return Loading(
            command, [self.store.submit(partial(_read, name, self.rank, self.ranks)) for name in command.names]
        )

    def go_on(self, loading: Loading, deadline: float, alone: bool) -> None:
        """Write what has been read into its blocks, which nobody reads yet, until a deadline of `time.perf_counter`."""
        while loading.outcome is None:
            if loading.written == len(loading.files):
                loading.outcome = loading.written
                return
            if loading.under_way is None:
                segment = self._next(loading, NAP_SECONDS if alone else 0)
                if segment is None:
                    return
                loading.under_way = self._write(loading, segment)
            if next(loading.under_way, self) is self:
                loading.under_way, loading.written = None, loading.written + 1
            if time.perf_counter() >= deadline:
                return

    def _next(self, loading: Loading, wait: float) -> StoredSegment | None:
        """The next segment's file; None while it is being read, or where it cannot be: then the load is over."""
        name = loading.command.names[loading.written]
        try:
            segment = loading.files[loading.written].result(wait)
            self._check(segment, len(loading.command.packed[loading.written]))
            return segment
        except StillReading:
            if time.monotonic() < loading.since + PATIENCE_SECONDS * (1 + loading.written):
                return None
            logger.warning("kvsculpt: the store takes more than %g s: not waited for", PATIENCE_SECONDS)
        except (Unusable, StoreAway, OSError):
            pass  # the store has told the log, and counts it
        except ValueError as error:
            logger.warning("kvsculpt: %s in the store is of no use here: %s", name.path(self.rank, self.ranks), error)
        loading.outcome = loading.written
        return None

    def _check(self, segment: StoredSegment, blocks: int) -> None:
        """That a segment is one of this model's, whatever its name says.

        Raises:
            ValueError: says what differs.
        """
        geometry, buffer = self.state.geometry, self.state.pages.buffer
        shape = (geometry.num_layers, geometry.num_heads)
        pages = int(segment.pages.sum()) if tuple(segment.pages.shape) == shape else -1
        entries = (pages * geometry.block_size, self.state.pages.head_size)
        if (
            not 0 < pages <= blocks * geometry.num_cells
            or int(segment.pages.min()) < 0
            or tuple(segment.keys.shape) != entries
            or tuple(segment.values.shape) != entries
            or {segment.keys.dtype, segment.values.dtype} != {buffer.dtype}
        ):
            raise ValueError(
                f"pages {tuple(segment.pages.shape)}, keys {tuple(segment.keys.shape)} {segment.keys.dtype}: wanted "
                f"{shape} with up to {blocks * geometry.num_cells} pages, {entries} {buffer.dtype}"
            )

    def _write(self, loading: Loading, segment: StoredSegment) -> Iterator[None]:
        """Fill a segment's blocks, in slices."""
        state, geometry = self.state, self.state.geometry
        blocks, device = loading.command.packed[loading.written], state.pages.buffer.device
        lengths = segment.pages.flatten().tolist()
        starts = page_layout.place(lengths)
        cells = _cells(geometry, blocks, starts, lengths, device)
        most = max(1, SLICE_BYTES // state.pages.buffer[0].nbytes)
        for first in range(0, len(cells), most):
            entries = slice(first * geometry.block_size, (first + most) * geometry.block_size)
            own = (tensor[entries].to(device) for tensor in (segment.keys, segment.values))
            state.pages.write(cells[first : first + most], *own)
            yield
        shape = (geometry.num_layers, geometry.num_heads)
        span_blocks = segment.name.tokens // geometry.block_size
        ticket = self._ticket(loading, loading.written)
        state.directory.prepare(ticket, torch.tensor(starts).view(shape), segment.pages.long(), span_blocks)

    def conclude(self, loading: Loading, usable: int) -> None:
        """All ranks have read so many segments: these may be read from now on."""
        directory = self.state.directory
        for i, packed in enumerate(loading.command.packed):
            if i < usable:
                directory.publish(self._ticket(loading, i), packed[0])
            else:
                directory.release(self._ticket(loading, i))

    @staticmethod
    def _ticket(loading: Loading, index: int) -> str:
        """What the directory knows a prepared segment by; requests have other names."""
        return f"\0load {loading.command.number} {index}"

    def save(self, name: StoredName, packed: list[int]) -> None:
        """Have a published segment written to the store. Its pages are read now: they may be others' after the step."""
        geometry, device = self.state.geometry, self.state.pages.buffer.device
        starts, lengths = self.state.directory.places(packed[0])
        cells = _cells(geometry, packed, starts, lengths, device)
        keys, values = self.state.pages.read(cells)
        pages = torch.tensor(lengths, dtype=torch.int32).view(geometry.num_layers, geometry.num_heads)
        on_host = to_host(keys, values)

        def make() -> StoredSegment:
            keys, values = on_host()
            return StoredSegment(name, self.rank, self.ranks, pages, keys, values, dict(self.about))

        self.store.write(make, keys.nbytes + values.nbytes)


def to_host(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Begin to copy tensors to the host; what is returned gives them once they are there, on any thread."""
    if tensors[0].device.type == "cpu":
        return lambda: list(tensors)
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    there = torch.cuda.Event()
    there.record()

    def wait() -> list[Tensor]:
        there.synchronize()
        return copies

    return wait
