"""Stored segments by name: found, read, written, bounded. Several ranks and servers may use one store at once.

Files are immutable, so nobody ever waits for anybody: a better make of a segment is another file, and what is worse
goes once all ranks' files of the better one are there. Who finds a file and reads it too late gets `Reason.GONE`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from threading import Lock

from kvsculpt_vllm.store.file import StoredSegment, decode, encode, header_end, read_header
from kvsculpt_vllm.store.names import StoredName
from kvsculpt_vllm.store.places import Found, is_partial, open_place, shown, told
from kvsculpt_vllm.store.unusable import Reason, Unusable

LEFT_OVER = 3600.0
"""Seconds after which a file that is still partial, or a segment that still misses a rank's file, is nobody's."""

LISTED = 600.0
"""Seconds after which a writer lists the store again to see what others have written."""

SLACK = 0.05
"""The share of the bound that a write's sweep frees besides, so that not every write has to sweep."""


class Refusal(StrEnum):
    """Why a segment was not written. Metrics have these names."""

    THERE = "there"  # at least as good a make of it
    TOO_LARGE = "too_large"  # for the store's bound
    READ_ONLY = "read_only"


@dataclass
class StoredEntry:
    """A make of a segment: the files of all its ranks."""

    name: StoredName
    ranks: int
    files: dict[int, Found] = field(default_factory=dict)  # by rank

    @property
    def complete(self) -> bool:
        """Whether all ranks' files are there."""
        return len(self.files) == self.ranks

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for file in self.files.values())

    @property
    def used(self) -> float:
        """Seconds since 1970: when the last of its files was written or, on a local file system, read; what tells no
        time was used just now.
        """
        times = [file.used for file in self.files.values()]
        return max(time.time() if moment is None else moment for moment in times)

    @property
    def replaces(self) -> tuple[bytes, bytes, int]:
        """What makes have in common of which one replaces another."""
        return self.name.parent, self.name.key, self.ranks

    def better_than(self, other: StoredEntry) -> bool:
        """Whether it replaces another make; of two that are equally good, everybody takes the same one."""
        return self.replaces == other.replaces and (self.name.quality, self.name.made) > (
            other.name.quality,
            other.name.made,
        )


@dataclass(frozen=True)
class Traffic:
    """What a `Store` has moved."""

    reads: int = 0  # segments
    bytes_read: int = 0  # of their files
    writes: int = 0
    bytes_written: int = 0


class Store:
    """A directory, or what an fsspec URL means. All methods raise OSError where that does not do its part."""

    def __init__(self, url: str, size: int | None, writable: bool) -> None:
        """`size` is the bound in bytes of all files together, None for no bound.

        Raises:
            ValueError: the URL means nothing, or a package that it needs is missing.
        """
        if size is not None and size <= 0:
            raise ValueError(f"a store's size is {size} bytes, allowed: more than 0")
        self._place = open_place(url)
        self.url = shown(url)
        self.size, self.writable = size, writable
        self._avoided: set[tuple[StoredName, int]] = set()
        self._lock = Lock()  # of what follows
        self._estimate = 0  # bytes in the store, as far as this process knows
        self._listed: float | None = None  # monotonic
        self._traffic = Traffic()

    def check(self) -> None:
        """See at start-up whether the store can be used, making its directory if it is writable.

        Raises:
            ValueError: it cannot; the message has cause and cure.
        """
        try:
            self._place.check(self.writable)
        except FileNotFoundError as error:
            cure = "name a directory that is there, or let the store be written to, so that it is made"
            raise ValueError(f"the store {self.url} is not there: {told(error)}; {cure}") from error
        except OSError as error:
            cure = "let the server's user read and write there" if self.writable else "let the server's user read there"
            use = "written to" if self.writable else "read"
            raise ValueError(f"the store {self.url} cannot be {use}: {told(error)}; {cure}") from error

    def find(self, parent: bytes, ranks: int) -> list[StoredName]:
        """The segments that may follow a chain and that all ranks can read: those of most tokens first, and of one key
        the best first. None where nothing was stored.
        """
        entries = self._following(parent)
        usable = [entry.name for entry in entries if entry.complete and entry.ranks == ranks]
        return sorted(usable, key=lambda name: (name.tokens, name.quality, name.made), reverse=True)

    def read(self, name: StoredName, rank: int, ranks: int) -> StoredSegment:
        """One rank's entries. On a local file system the file counts as used now, if the store is writable.

        What is unusable is not found again by this `Store`. If it is cut off or altered, a writable store removes it,
        so that its segment can be written anew.

        Raises:
            Unusable: the file is not what was written under its name, or is not there any more.
        """
        path = name.path(rank, ranks)
        try:
            try:
                data = self._place.read(path)
            except FileNotFoundError as error:
                raise Unusable(Reason.GONE, f"{path} was removed since it was found") from error
            except IsADirectoryError as error:
                raise Unusable(Reason.FOREIGN, str(error)) from error
            segment = decode(data, name, rank, ranks)
        except Unusable as error:
            if error.reason != Reason.GONE:
                self.avoid(name, ranks)
            if self.writable and error.reason in (Reason.CUT_OFF, Reason.ALTERED):
                self._place.remove(path)
            raise
        self._moved(reads=1, bytes_read=len(data))
        if self.writable:
            self._place.mark_used(path)
        return segment

    def mark_used(self, parent: bytes, key: bytes) -> None:
        """Count a segment's files as used now, where a local file system can tell: it was used by those who have it
        still, so that nobody reads it. If they lose it, it is to be here.
        """
        if self.writable and self._place.tells_use:
            for entry in self._following(parent):
                if entry.name.key == key:
                    for file in entry.files.values():
                        self._place.mark_used(file.path)

    def read_about(self, name: StoredName, rank: int, ranks: int) -> dict[str, str]:
        """What one rank's file says about itself. Only the header is read, and nothing is proved by the checksum.

        Raises:
            Unusable: it has no header of ours, or is not there any more.
        """
        path = name.path(rank, ranks)
        try:
            end = header_end(bytes(self._place.read(path, 8)))
            return read_header(bytes(self._place.read(path, end)), path).about
        except FileNotFoundError as error:
            raise Unusable(Reason.GONE, f"{path} is not there") from error
        except IsADirectoryError as error:
            raise Unusable(Reason.FOREIGN, str(error)) from error

    def avoid(self, name: StoredName, ranks: int) -> None:
        """Do not find this make again, nor let it keep a new one from being written: one of its files is unusable."""
        self._avoided.add((name, ranks))

    def write(self, segment: StoredSegment) -> bool:
        """Keep one rank's entries; False if they were not kept (`put` says why)."""
        return self.put(segment) is None

    def put(self, segment: StoredSegment) -> Refusal | None:
        """Keep one rank's entries; None if they were.

        They are not kept where an at least as good make of the segment is there for all ranks. Worse makes go as soon
        as all ranks' files of this one are there. May sweep.

        Raises:
            ValueError: the segment's tensors do not fit one another.
        """
        if not self.writable:
            return Refusal.READ_ONLY
        if self._too_large(segment.nbytes * segment.ranks):
            return Refusal.TOO_LARGE
        name, mine = segment.name, StoredEntry(segment.name, segment.ranks)
        for entry in self._following(name.parent):
            if entry.replaces == mine.replaces and entry.complete and entry.name.quality >= name.quality:
                return Refusal.THERE
            if entry.name == name and entry.ranks == segment.ranks and segment.rank in entry.files:
                return Refusal.THERE
        data = encode(segment)
        if self._too_large(len(data) * segment.ranks):
            return Refusal.TOO_LARGE
        self._place.write(segment.path, data)
        self._moved(writes=1, bytes_written=len(data))
        self._avoided.discard((name, segment.ranks))
        everything = list(self._following(name.parent))  # not what is avoided: it may be of a later version
        if any(entry.name == name and entry.ranks == segment.ranks and entry.complete for entry in everything):
            self._remove(
                entry
                for entry in everything
                if mine.better_than(entry)
                or (entry.replaces == mine.replaces and (entry.name, entry.ranks) in self._avoided)
            )
        self._bound(len(data) * segment.ranks)  # the other ranks write as much
        return None

    def entries(self) -> list[StoredEntry]:
        """All that is stored, incomplete makes included; those used longest ago first."""
        return sorted(_grouped(self._place.files()), key=lambda entry: (entry.used, entry.name.key))

    def remove(self, name: StoredName) -> int:
        """Remove all ranks' files of a make; returns the bytes that this frees."""
        freed = self._remove(entry for entry in self._following(name.parent, avoided=True) if entry.name == name)
        self._place.remove_if_empty(name.parent.hex())
        return freed

    def sweep(self) -> int:
        """Bring the store down to its bound: what was used longest ago goes first. What was left over by writers that
        ended, and makes that a better one replaces, go in any case.

        Servers that sweep at the same time remove the same. Returns the bytes that are left.
        """
        return self._sweep(0)

    def _sweep(self, slack: float) -> int:
        """Where the bound is exceeded, the share `slack` of it is freed besides, but never the newest make for that."""
        folders, files = self._place.folders(), list(self._place.files())
        old = time.time() - LEFT_OVER
        for file in files:
            if is_partial(file.path) and file.used is not None and file.used < old:
                self._place.remove(file.path)
        entries = sorted(_grouped(files), key=lambda entry: (entry.used, entry.name.key))
        kept = _worth_keeping(entries, old)
        left, excess = sum(entry.size for entry in kept), 0
        if self.size is not None and left > self.size:
            while left > self.size or (left > self.size * (1 - slack) and excess < len(kept) - 1):
                left -= kept[excess].size
                excess += 1
        staying = {id(entry) for entry in kept[excess:]}
        self._remove(entry for entry in entries if id(entry) not in staying)
        for folder in set(folders) - {entry.name.parent.hex() for entry in kept[excess:]}:
            self._place.remove_if_empty(folder)
        with self._lock:
            self._estimate, self._listed = left, time.monotonic()
        return left

    def _bound(self, added: int) -> None:
        """Sweep if so many bytes more may exceed the bound, or if others have had the time to exceed it."""
        with self._lock:
            self._estimate += added
            current = self._listed is not None and time.monotonic() - self._listed < LISTED
            if current and (self.size is None or self._estimate <= self.size):
                return
        self._sweep(SLACK)

    def traffic(self) -> Traffic:
        """What was read and written so far."""
        with self._lock:
            return self._traffic

    def _moved(self, **more: int) -> None:
        with self._lock:
            now = {key: getattr(self._traffic, key) + count for key, count in more.items()}
            self._traffic = replace(self._traffic, **now)

    def _too_large(self, size: int) -> bool:
        return self.size is not None and size > self.size

    def _following(self, parent: bytes, avoided: bool = False) -> Iterator[StoredEntry]:
        for entry in _grouped(self._place.files_in(parent.hex())):
            if avoided or (entry.name, entry.ranks) not in self._avoided:
                yield entry

    def _remove(self, entries: Iterable[StoredEntry]) -> int:
        freed = 0
        for entry in entries:
            for file in entry.files.values():
                self._place.remove(file.path)
            freed += entry.size
        return freed


def _grouped(files: Iterable[Found]) -> list[StoredEntry]:
    """The files of each make together; what is no segment's is left out."""
    entries: dict[tuple[StoredName, int], StoredEntry] = {}
    for file in files:
        parsed = StoredName.parse(file.path)
        if parsed is not None:
            name, rank, ranks = parsed
            entries.setdefault((name, ranks), StoredEntry(name, ranks)).files[rank] = file
    return list(entries.values())


def _worth_keeping(entries: list[StoredEntry], old: float) -> list[StoredEntry]:
    """Those that no better one replaces, and that are complete or were still written to since `old`."""
    best: dict[tuple[bytes, bytes, int], StoredEntry] = {}
    for entry in entries:
        if entry.complete:
            other = best.setdefault(entry.replaces, entry)
            if entry.better_than(other):
                best[entry.replaces] = entry
    return [
        entry
        for entry in entries
        if (entry.complete or entry.used > old)
        and not (entry.replaces in best and best[entry.replaces].better_than(entry))
    ]
