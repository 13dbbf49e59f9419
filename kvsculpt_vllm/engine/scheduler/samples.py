"""Whose queries the workers keep, of which positions, and how many more there is room for.

A segment is fitted to the queries of all its positions. Workers keep those that the scheduler names, until the segment
is made. Their memory is bounded: a prompt that has come too far ahead of its segments waits for them.
"""

from __future__ import annotations

from dataclasses import dataclass

NONE = 1 << 62


@dataclass
class Kept:
    """Of one request: positions from `first` to `end`, and how many it may come to at least."""

    first: int
    end: int
    reserved: int


class Samples:
    """The positions whose queries are kept, by request."""

    def __init__(self, room: int) -> None:
        """`room` is the number of positions that all requests together may have."""
        self._room = room
        self._kept: dict[str, Kept] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._kept

    def has_room(self, positions: int) -> bool:
        """Whether one more request may reserve so many. If there is no other it may whatever it needs."""
        return not self._kept or self._taken() + positions <= self._room

    def begin(self, request_id: str, first: int, reserved: int) -> None:
        """Keep those of a request from position `first` on; `reserved` are what its next segment needs."""
        self._kept[request_id] = Kept(first, first, reserved)

    def extend(self, request_id: str, end: int) -> None:
        """The positions before `end` are computed now."""
        kept = self._kept[request_id]
        kept.end = max(kept.end, end)
        kept.reserved = max(kept.reserved, kept.end - kept.first)

    def drop(self, request_id: str, before: int, reserved: int) -> None:
        """Those before a position are not needed any more; `reserved` are what the next segment needs."""
        kept = self._kept[request_id]
        kept.first = before
        kept.reserved = max(reserved, kept.end - before)

    def release(self, request_id: str) -> None:
        """Nothing is kept of a request any more; an unknown one is fine."""
        self._kept.pop(request_id, None)

    def first(self, request_id: str) -> int:
        """The first position that is kept; behind all there are for a request of which nothing is."""
        kept = self._kept.get(request_id)
        return NONE if kept is None else kept.first

    def most(self, request_id: str) -> int:
        """The position up to which the request may be computed for now."""
        kept = self._kept[request_id]
        others = self._taken() - kept.reserved
        return kept.first + max(kept.reserved, self._room - others)

    def cover(self, request_id: str, first: int, end: int) -> bool:
        """Whether all positions from `first` to `end` are kept."""
        kept = self._kept.get(request_id)
        return kept is not None and kept.first <= first and end <= kept.end

    def _taken(self) -> int:
        return sum(kept.reserved for kept in self._kept.values())
