"""Tells the store which of its segments are used in memory.

What is found in memory is not read from the store, so that its file would look unused: the hotter a segment is, the
sooner the store would drop it, and a restart would not find it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from kvsculpt_vllm.engine.scheduler.segments import Segment
from kvsculpt_vllm.store.background import BackgroundStore
from kvsculpt_vllm.store.store import Store

EVERY = 600.0
"""Seconds after which a segment that is used is told of again."""


class StoreMarks:
    """When each segment was told of."""

    def __init__(self, store: BackgroundStore, now: Callable[[], float] = time.monotonic) -> None:
        self._store, self._now = store, now
        self._told: dict[bytes, float] = {}

    def used(self, chain: Iterable[Segment]) -> None:
        """Requests use these segments now. The store hears of it beside the path of requests, and may be gone."""
        now = self._now()
        due = [segment for segment in chain if segment.shared and now - self._told.get(segment.key, -EVERY) >= EVERY]
        if not due:
            return
        self._told = {key: at for key, at in self._told.items() if now - at < EVERY}  # it does not grow for ever
        names = [(segment.parent, segment.key) for segment in due]
        self._told.update((segment.key, now) for segment in due)

        def mark(store: Store) -> None:
            for parent, key in names:
                store.mark_used(parent, key)

        self._store.submit(mark)
