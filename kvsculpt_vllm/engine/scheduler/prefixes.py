"""Prefixes that somebody had sculpted by name: which segments they are, who has used them, and which are pinned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from kvsculpt_vllm.engine.scheduler.segments import Segment, Segments
from kvsculpt_vllm.engine.scheduler.windows import are_there
from kvsculpt_vllm.engine.shared.prefix_wish import Wish
from kvsculpt_vllm.engine.shared.record import printable

logger = init_logger("vllm.kvsculpt")

MOST_PREFIXES = 1024
"""That are listed: the oldest one that is not pinned goes first."""


@dataclass
class Prefix:
    """A prefix that was sculpted without an answer."""

    wish: Wish
    prompt_tokens: int
    chain: list[Segment]
    made: float  # on the monotonic clock
    pinned: bool = False
    before: list[KVCacheBlock] = field(default_factory=list)  # blocks of windows that its pin holds
    hits: int = 0  # requests that began with all of it

    @property
    def expires(self) -> float | None:
        """When, on the monotonic clock."""
        return None if self.wish.ttl is None else self.made + self.wish.ttl


class Prefixes:
    """All of them. A pinned one holds its segments' blocks, as a request would."""

    def __init__(
        self, segments: Segments, pool: BlockPool, most_pinned: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        """`most_pinned` blocks may be pinned together; `now` tells the seconds."""
        self._segments, self._pool, self.most_pinned, self.now = segments, pool, most_pinned, now
        self._prefixes: dict[str, Prefix] = {}  # the oldest first

    def keep(self, wish: Wish, prompt_tokens: int, chain: list[Segment]) -> bool:
        """List a prefix whose request still holds its chain, and pin it if that is wanted. Returns whether it is
        pinned: not where too many blocks would be, or where its segments are nobody else's to find.
        """
        self.expire()
        prefix = Prefix(wish, prompt_tokens, list(chain), self.now())
        self._prefixes[wish.prefix_id] = prefix
        if wish.pin and chain and all(segment.shared for segment in chain):
            self._pin(prefix)
        while len(self._prefixes) > MOST_PREFIXES:
            oldest = next((i for i, other in self._prefixes.items() if not other.pinned), None)
            if oldest is None:
                break
            del self._prefixes[oldest]
        return prefix.pinned

    def _pin(self, prefix: Prefix) -> None:
        pinned = self._pinned_segments()
        more = sum(len(segment.packed) for segment in prefix.chain if segment.serial not in pinned)
        last = prefix.chain[-1].before
        if last is None or not are_there(last):
            return
        before = [named.block for group in last for named in group]
        if self.pinned_blocks + more + len(before) > self.most_pinned:
            return
        for segment in prefix.chain:
            self._pool.touch(segment.packed)
            self._segments.hold(segment, self._holder(prefix))
        self._pool.touch(before)
        prefix.before, prefix.pinned = before, True

    def _unpin(self, prefix: Prefix) -> None:
        if prefix.pinned:
            prefix.pinned = False
            self._segments.release(self._holder(prefix))
            self._pool.free_blocks(reversed(prefix.before))
            prefix.before = []
            for segment in reversed(prefix.chain):
                self._pool.free_blocks(reversed(segment.packed))

    @staticmethod
    def _holder(prefix: Prefix) -> str:
        """What segments know a pin by; requests have other names."""
        return f"\0pin {prefix.wish.prefix_id}"

    def used(self, chain: Iterable[Segment]) -> None:
        """A request has found these segments, of which its prompt's chain consists."""
        keys = {segment.key for segment in chain}
        for prefix in self._prefixes.values():
            prefix.hits += bool(prefix.chain) and prefix.chain[-1].key in keys

    def expire(self) -> None:
        """Let go of those whose time is over."""
        now = self.now()
        for prefix_id, prefix in list(self._prefixes.items()):
            if prefix.expires is not None and prefix.expires <= now:
                self.remove(prefix_id, and_its_segments=False)

    def remove(self, prefix_id: str, and_its_segments: bool = True) -> bool:
        """Forget a prefix, by its id or its name, and free its blocks as far as no other one needs them. Returns
        whether there was one.
        """
        found = [self._prefixes[prefix_id]] if prefix_id in self._prefixes else []
        found = found or [p for p in self._prefixes.values() if prefix_id and p.wish.name == prefix_id]
        for prefix in found:
            self._unpin(prefix)
            del self._prefixes[prefix.wish.prefix_id]
            others = {segment.key for other in self._prefixes.values() for segment in other.chain}
            if and_its_segments:
                # From the end: a segment serves nobody without those before it.
                for segment in reversed(prefix.chain):
                    if segment.key in others or not self._segments.drop(segment):
                        break
        return bool(found)

    def give_way(self) -> bool:
        """Let go of the blocks of the prefix that was pinned first; returns whether there was one."""
        first = next((prefix for prefix in self._prefixes.values() if prefix.pinned), None)
        if first is None:
            return False
        logger.warning(
            "kvsculpt: the prefix %s is not pinned any more: a request needs its blocks that fits into the memory only "
            "without it; lower --kv-compression-pin-blocks or --max-model-len",
            printable(first.wish.name or first.wish.prefix_id),
        )
        self._unpin(first)
        return True

    def unpin_all(self) -> list[Prefix]:
        """Let go of all blocks, as the cache is to be emptied; returns whose they were."""
        pinned = [prefix for prefix in self._prefixes.values() if prefix.pinned]
        for prefix in pinned:
            self._unpin(prefix)
        return pinned

    def pin_again(self, prefixes: list[Prefix]) -> None:
        """Take the blocks again, of those that are still there."""
        for prefix in prefixes:
            if all(segment.alive for segment in prefix.chain):
                self._pin(prefix)

    def _pinned_segments(self) -> dict[int, Segment]:
        """By their serial numbers: prefixes may share some."""
        pinned = (p for p in self._prefixes.values() if p.pinned)
        return {segment.serial: segment for prefix in pinned for segment in prefix.chain}

    @property
    def pinned_blocks(self) -> int:
        """That are held by pins now."""
        packed = sum(len(segment.packed) for segment in self._pinned_segments().values())
        return packed + len({block.block_id for prefix in self._prefixes.values() for block in prefix.before})

    def told(self) -> dict[str, Any]:
        """All of them, the newest first, and the bound; plain values."""
        self.expire()
        now = self.now()
        return {
            "most_pinned_blocks": self.most_pinned,
            "pinned_blocks": self.pinned_blocks,
            "prefixes": [
                {
                    "id": prefix.wish.prefix_id,
                    "name": prefix.wish.name,
                    "prompt_tokens": prefix.prompt_tokens,
                    "tokens": sum(segment.tokens for segment in prefix.chain),
                    # What is not there any more is made, or read from the store, when it is next asked for.
                    "tokens_in_memory": sum(s.tokens for s in prefix.chain if self._segments.has(s)),
                    "blocks": sum(len(segment.packed) for segment in prefix.chain),
                    "held_out_error": max((segment.error for segment in prefix.chain), default=0.0),
                    "pinned": prefix.pinned,
                    "hits": prefix.hits,
                    "age_seconds": now - prefix.made,
                    "expires_in_seconds": None if prefix.expires is None else prefix.expires - now,
                }
                for prefix in reversed(self._prefixes.values())
            ],
        }
