"""Segments between their pages and the store: read out when they are made, written into blocks when they are found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
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
from kvsculpt_vllm.sculpt.transfer import on_device
from kvsculpt_vllm.store.background import BackgroundStore, StoreAway
from kvsculpt_vllm.store.file import StoredSegment
from kvsculpt_vllm.store.names import StoredName
from kvsculpt_vllm.store.store import Store
from kvsculpt_vllm.store.unusable import Reason, Unusable

if TYPE_CHECKING:
    from kvsculpt_vllm.engine.worker.state import CompressionState

logger = init_logger("vllm.kvsculpt")

SLICE_BYTES = 16 << 20
"""Of a segment, written between two looks at the clock."""
AHEAD = 3
"""Files that are read, or wait to be written, at once."""
NAP_SECONDS = 0.02
"""For how long a step that nobody else waits for waits for a file."""


@dataclass(frozen=True)
class ReadOutcome:
    """What became of a load on one rank."""

    usable: int  # segments, of the first ones, that are in their blocks
    broken: bool = False  # the next one's file can never be used


@dataclass
class Loading:
    """A load in hand, of one rank."""

    command: LoadCommand
    files: dict[int, Future[StoredSegment]] = field(default_factory=dict)  # being read, by the segment's number
    since: float = field(default_factory=time.monotonic)
    written: int = 0  # segments, of the first ones
    under_way: Iterator[None] | None = None  # the next one, being written
    outcome: ReadOutcome | None = None  # once this rank is through


def _cells(
    geometry: PageGeometry, blocks: list[int], starts: list[int], lengths: list[int], device: torch.device
) -> Tensor:
    """Pages of a segment's entries, those of each (layer, head) together, layers outermost: as a file has them."""
    cells = geometry.packed_pages(on_device(blocks, device))
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
        self._left = False

    def leave(self) -> None:
        """Neither read nor write any more: what names say of the model's weights is not true any more."""
        if not self._left:
            logger.warning("kvsculpt: the model's weights change: the store is not used any more until a restart")
        self._left = True

    def begin(self, command: LoadCommand) -> Loading:
        """Have the first files read."""
        loading = Loading(command)
        if self._left:
            loading.outcome = ReadOutcome(0)
        else:
            self._read_ahead(loading)
        return loading

    def _read_ahead(self, loading: Loading) -> None:
        """Have the next files read: a few, as each takes memory until it is written."""
        for number in range(loading.written, min(loading.written + AHEAD, len(loading.command.names))):
            if number not in loading.files:
                read = partial(_read, loading.command.names[number], self.rank, self.ranks)
                loading.files[number] = self.store.submit(read)

    def go_on(self, loading: Loading, deadline: float, alone: bool) -> None:
        """Write what has been read into its blocks, which nobody reads yet, until a deadline of `time.perf_counter`."""
        try:
            self._go_on(loading, deadline, alone)
        except Exception:  # no memory, no slot, a bug: its segments are made anew, and the engine goes on
            logger.exception("kvsculpt: segments could not be read from the store")
            loading.outcome = ReadOutcome(loading.written)

    def _go_on(self, loading: Loading, deadline: float, alone: bool) -> None:
        while loading.outcome is None:
            if loading.written == len(loading.command.names):
                loading.outcome = ReadOutcome(loading.written)
                return
            if loading.under_way is None:
                segment = self._next(loading, NAP_SECONDS if alone else 0)
                if segment is None:
                    return
                loading.under_way = self._write(loading, segment)
            if next(loading.under_way, self) is self:
                del loading.files[loading.written]
                loading.under_way, loading.written = None, loading.written + 1
                self._read_ahead(loading)
            if time.perf_counter() >= deadline:
                return

    def _next(self, loading: Loading, wait: float) -> StoredSegment | None:
        """The next segment's file; None while it is being read, or where it cannot be: then the load is over."""
        name, file = loading.command.names[loading.written], loading.files[loading.written]
        wait_for([file], wait)
        if not file.done():
            if time.monotonic() >= loading.since + PATIENCE_SECONDS * (1 + loading.written):
                logger.warning("kvsculpt: the store takes more than %g s: not waited for", PATIENCE_SECONDS)
                loading.outcome = ReadOutcome(loading.written)
            return None
        try:
            segment = file.result()
            self._check(segment, len(loading.command.packed[loading.written]))
            return segment
        except Unusable as error:  # the store has told the log, and counts it
            loading.outcome = ReadOutcome(loading.written, broken=error.reason != Reason.GONE)
        except (StoreAway, OSError):  # likewise
            loading.outcome = ReadOutcome(loading.written)
        except ValueError as error:
            logger.warning("kvsculpt: %s in the store is of no use here: %s", name.path(self.rank, self.ranks), error)
            self.store.avoid(name, self.ranks)
            loading.outcome = ReadOutcome(loading.written, broken=True)
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
            own = (on_device(tensor[entries], device) for tensor in (segment.keys, segment.values))
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
        if self._left:
            return
        try:
            self._save(name, packed)
        except Exception:  # no memory, say: the segment is in use all the same
            logger.exception("kvsculpt: a segment is not written to the store")

    def _save(self, name: StoredName, packed: list[int]) -> None:
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
