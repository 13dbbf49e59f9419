"""The books: what became of every request, and the totals that metrics are made of.

The worker keeps them, because workers are what a server's front ends can ask (`collective_rpc`); what only the
scheduler knows comes along with its commands.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from dataclasses import asdict
from typing import Any

from kvsculpt_vllm.engine.shared import request_ids
from kvsculpt_vllm.engine.shared.commands import Deferred, PoolState, SegmentCounts, Settled, StoreState
from kvsculpt_vllm.engine.shared.reasons import Outcome, Reason
from kvsculpt_vllm.engine.shared.record import CompressionRecord, of_all_segments
from kvsculpt_vllm.store.background import BackgroundStore

STORIES_KEPT = 256
"""Requests of which more is kept than their share in the totals: so many with a compression, and so many without, so
that many short prompts do not drive out what there is to see."""

SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)
ERRORS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


class Histogram:
    """Counts of observations up to each bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count `value` in the first bucket whose bound it does not exceed."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def as_dict(self) -> dict[str, Any]:
        """Tell the bounds, the counts and the sum. There is one count for each bound, and one for what is above all of
        them.
        """
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum}


class Ledger:
    """The books of one worker. A request that is preempted and comes back is settled, and counted, again."""

    def __init__(self, block_bytes: int, store: BackgroundStore | None = None) -> None:
        """`store` is what this worker keeps segments in."""
        self._block_bytes, self._store = block_bytes, store
        self._requests: Counter[tuple[str, str]] = Counter()
        self._deferred: Counter[str] = Counter()
        self._totals: Counter[str] = Counter(
            span_tokens=0, entries_kept=0, blocks_freed=0, solver_steps=0, segments=0, remade=0
        )
        self._seconds = Histogram(SECONDS)
        self._errors = {"before": Histogram(ERRORS), "after": Histogram(ERRORS)}
        self._pool, self._segments, self._looked_up = PoolState(0, 0, 0, 0, 0), SegmentCounts(), StoreState()
        self._compressed: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._others: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def hear(self, news: Settled | Deferred | PoolState | SegmentCounts | StoreState) -> None:
        """Enter what the scheduler tells."""
        if isinstance(news, PoolState):
            self._pool = news
        elif isinstance(news, SegmentCounts):
            self._segments = news
        elif isinstance(news, StoreState):
            self._looked_up = news
        elif isinstance(news, Settled):
            before = self._others.get(news.request_id)
            if (
                news.reason == Reason.ENDED_FIRST
                and before is not None
                and before["outcome"] in (Outcome.FALLBACK, Outcome.FAILED)
            ):
                return  # it ended before the scheduler heard of the failure, which is counted
            self.settle(news.request_id, news.num_prompt_tokens, news.outcome, news.reason)
        else:
            self._deferred[news.reason] += 1
            self._tell(news.request_id, news.num_prompt_tokens, Outcome.DEFERRED, news.reason)

    def settle(self, request_id: str, num_prompt_tokens: int, outcome: str, reason: str, detail: str = "") -> None:
        """Enter that a request keeps its exact cache, and why."""
        self._requests[outcome, reason] += 1
        self._tell(request_id, num_prompt_tokens, outcome, reason, detail)

    def compressed(self, record: CompressionRecord, first_of_request: bool = True) -> None:
        """Enter a compression: from now on the segment is in use. A request is counted with its first one."""
        outcome = Outcome.FALLBACK if record.fallback else Outcome.COMPRESSED
        if first_of_request:
            self._requests[outcome, record.fallback] += 1
        self._totals.update(
            span_tokens=record.span_tokens,
            entries_kept=round(record.entries_kept),
            blocks_freed=record.blocks_freed,
            solver_steps=record.solver_steps,
            segments=1,
            remade=record.times_made - 1,
        )
        self._seconds.observe(record.seconds)
        self._errors["before"].observe(record.error_before)
        self._errors["after"].observe(record.error_after)
        known = self._compressed.get(record.request_id)
        if known is not None and not first_of_request:
            record = of_all_segments(known["compression"], record)
        self._tell(record.request_id, record.prompt_tokens, outcome, record.fallback, record=record)

    def stats(self) -> dict[str, Any]:
        """Tell the totals since start, and the block pool as it is now; JSON-serialisable."""
        requests: dict[str, dict[str, int]] = {outcome.value: {} for outcome in Outcome if outcome != Outcome.DEFERRED}
        for (outcome, reason), count in sorted(self._requests.items()):
            requests[str(outcome)][str(reason)] = count
        return {
            "requests": requests,
            "deferred": {str(reason): count for reason, count in self._deferred.items()},
            **self._totals,
            "found": asdict(self._segments),
            "store": self._store_counts(),
            "bytes_freed": self._totals["blocks_freed"] * self._block_bytes,
            "seconds": self._seconds.as_dict(),
            "held_out_error": {stage: histogram.as_dict() for stage, histogram in self._errors.items()},
            "pool": asdict(self._pool) | {"bytes_saved": self._pool.saved * self._block_bytes},
        }

    def _store_counts(self) -> dict[str, Any]:
        """What became of the store's operations: this worker's, and the scheduler's look-ups. Empty without a store."""
        if self._store is None:
            return {}
        counts, looked_up = self._store.counts(), self._looked_up
        return asdict(counts) | {
            "failures": counts.failures + looked_up.failures,
            "unanswered": counts.unanswered + looked_up.unanswered,
            "away": counts.away or looked_up.away,
        }

    def newest(self, limit: int) -> list[dict[str, Any]]:
        """Tell what became of the last `limit` requests, the newest first, without the lists by layer and head."""
        stories = sorted([*self._others.values(), *self._compressed.values()], key=lambda story: -story["time"])
        return [_as_dict(story, CompressionRecord.summary) for story in stories[:limit]]

    def find(self, request_id: str) -> dict[str, Any] | None:
        """Tell what became of one request, by the engine's id or by the client's, the newest if there are several."""
        stories = self._others | self._compressed
        found = [stories[engine_id] for engine_id in request_ids.find(request_id, stories)]
        return _as_dict(max(found, key=lambda story: story["time"]), asdict) if found else None

    def _tell(
        self,
        request_id: str,
        num_prompt_tokens: int,
        outcome: str,
        reason: str,
        detail: str = "",
        record: CompressionRecord | None = None,
    ) -> None:
        story = {
            "request_id": request_id,
            "time": time.time(),
            "prompt_tokens": num_prompt_tokens,
            "outcome": str(outcome),
            "reason": str(reason),
            "detail": detail,
            "compression": record,
        }
        for stories in (self._others, self._compressed):
            stories.pop(request_id, None)  # the newest takes the place of what was told before, and goes last
        stories = self._others if record is None else self._compressed
        stories[request_id] = story
        if len(stories) > STORIES_KEPT:
            stories.popitem(last=False)


def _as_dict(story: dict[str, Any], tell: Any) -> dict[str, Any]:
    record = story["compression"]
    return story | {"compression": None if record is None else tell(record)}
