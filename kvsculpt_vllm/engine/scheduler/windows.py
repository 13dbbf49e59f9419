"""Layers that see a window have blocks of their own. Whoever goes on behind a segment needs those of the window before.

They are named where a segment is to end, while its request has them, and held by nobody: their memory goes to whoever
needs it, as that of any cached block does. Without them a segment is not found, as if it were not there.

A model without such layers has no windows, and nothing here does anything.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from itertools import count, takewhile
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock
from vllm.v1.request import Request

from kvsculpt_vllm.engine.compat.scheduler import BlockLists, WindowLists, insert_hash


class Named(NamedTuple):
    """A block, and what it was called: called otherwise, it holds something else, or will."""

    block: KVCacheBlock
    name: BlockHashWithGroupId

    @property
    def is_there(self) -> bool:
        """Whether it holds what it held."""
        return self.block.block_hash == self.name


Before = list[list[Named]]
"""Of each group of windows, the blocks before a place in a context, as far as the next token sees them."""


def are_there(before: Before | None) -> bool:
    """Whether a request can go on from these; None says that there were some missing from the beginning."""
    return before is not None and all(named.is_there for group in before for named in group)


class Windows:
    """The blocks of windows before the places where segments end or may end."""

    def __init__(self, lists: BlockLists) -> None:
        self._pool, self._full, self._groups = lists.pool, lists, lists.windows
        self._before: dict[str, dict[int, Before]] = {}  # of each request, by the block that a segment ends before
        self._passed: dict[str, int] = {}  # of each request, the last such block that was looked at
        self._names = count()

    def __len__(self) -> int:
        return len(self._groups)

    def note(self, request: Request, ends: Iterable[int], block_size: int) -> None:
        """Name the blocks before those of the `ends` (blocks, ascending) that a running request has come past since the
        last call: as long as it has them, which is until it is given blocks for its next tokens.
        """
        request_id = request.request_id
        for end in ends:
            if end * block_size > request.num_computed_tokens:
                return
            if end > self._passed.get(request_id, 0):
                self._passed[request_id] = end
                if (before := self._taken(request_id, end)) is not None:
                    self._before.setdefault(request_id, {})[end] = before

    def before(self, request_id: str, end: int) -> Before | None:
        """What was noted of a request before block `end`; None if that is not all."""
        return self._before.get(request_id, {}).get(end) if self._groups else []

    def noted(self, request_id: str) -> set[int]:
        """The numbers of all blocks that were noted of a request and are what they were."""
        noted = self._before.get(request_id, {}).values()
        return {named.block.block_id for before in noted for group in before for named in group if named.is_there}

    def forget(self, request_id: str) -> None:
        """The request loses its blocks; an unknown one is fine."""
        self._before.pop(request_id, None)
        self._passed.pop(request_id, None)

    def longest(self, request: Request, before: Before, end: int, tail: int) -> int:
        """How many of the `tail` blocks that were found behind block `end` a request can begin with: windows have to be
        there, too. Before `end` they have what is there before it.
        """
        while tail and any(self._row(request, lists, own, end, tail) is None for lists, own in self._with(before)):
            tail -= 1
        return tail

    def rows(self, request: Request, before: Before, end: int, tail: int) -> list[list[KVCacheBlock]]:
        """What a request's block lists in each group of windows begin with, `tail` blocks behind block `end`."""
        rows = []
        for lists, own in self._with(before):
            row = self._row(request, lists, own, end, tail)
            assert row is not None  # as `longest` says, or none of the tail is used
            rows.append([self._pool.null_block] * (end + tail - len(row)) + row)
        return rows

    def all_groups(self, row: list[KVCacheBlock], windows: list[list[KVCacheBlock]]) -> tuple[list[KVCacheBlock], ...]:
        """The rows of all groups in their order, `row` being that of the layers that see everything."""
        rows = {self._full.group: row} | {
            lists.group: window for lists, window in zip(self._groups, windows, strict=True)
        }
        return tuple(rows[group] for group in sorted(rows))

    def most_blocks(self, blocks: int) -> int:
        """Blocks that windows take at most of a request that has so many in the other group."""
        return sum(min(blocks, lists.most) for lists in self._groups)

    def to_come(self, request_id: str, blocks: int) -> int:
        """Blocks that windows still take at most of a request that comes to so many in the other group."""
        return max(0, self.most_blocks(blocks) - self.held([request_id]))

    def held(self, request_ids: Iterable[str]) -> int:
        """Different blocks that requests hold in windows. Groups of equal windows hold the same blocks of a context, so
        that one of them tells for all: this is asked at every step.
        """
        if not self._groups:
            return 0
        number, requests = Counter(lists.reach for lists in self._groups), list(request_ids)
        held = 0
        for lists in {lists.reach: lists for lists in self._groups}.values():
            rows = (takewhile(lambda block: not block.is_null, reversed(lists.of(one))) for one in requests)
            held += number[lists.reach] * len({block.block_id for row in rows for block in row})
        return held

    def _with(self, before: Before) -> Iterable[tuple[WindowLists, list[Named]]]:
        return zip(self._groups, before, strict=True)

    def _taken(self, request_id: str, end: int) -> Before | None:
        before: Before = []
        for lists in self._groups:
            blocks = lists.of(request_id)[max(0, end - lists.reach) : end]
            if any(block.is_null for block in blocks):
                return None  # it has begun behind them
            before.append([Named(block, self._name_of(block, lists.group)) for block in blocks])
        return before

    def _name_of(self, block: KVCacheBlock, group: int) -> BlockHashWithGroupId:
        """What a block is called, from now on where it had no name."""
        if block.block_hash is None:
            digest = hashlib.sha256(b"kvsculpt window %d" % next(self._names)).digest()
            insert_hash(self._pool, BlockHash(digest), block, group=group)
        assert block.block_hash is not None
        return block.block_hash

    def _row(
        self, request: Request, lists: WindowLists, own: list[Named], end: int, tail: int
    ) -> list[KVCacheBlock] | None:
        """The blocks before the one that is `tail` blocks behind `end`, as far as the next token sees them; None if one
        is missing.
        """
        first, row = max(0, end + tail - lists.reach), []
        for index in reversed(range(max(end, first), end + tail)):  # what is missing is most likely the last
            if (found := self._pool.get_cached_block(request.block_hashes[index], [lists.group])) is None:
                return None
            row += found
        kept = own[len(own) - max(0, end - first) :]
        return [named.block for named in kept] + row[::-1]
