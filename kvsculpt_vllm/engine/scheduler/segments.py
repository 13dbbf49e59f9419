"""The segments there are: packed entries in vLLM's own pool, found by what they stand for, shared, evicted by age.

A segment is to a sculpted cache what a block is to an exact one. Its packed blocks are hashed under names of their own,
so that vLLM's pool does the rest: blocks that nobody holds any more stay until their memory is needed, the oldest
going first, `reset_prefix_cache` drops them, and who finds them holds them by their reference count.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.compat.scheduler import insert_hash, when_reused
from kvsculpt_vllm.engine.scheduler.windows import Before, are_there
from kvsculpt_vllm.sculpt.effort import order

FORMAT = 2
"""Changes with whatever makes packed entries of before unreadable or other than they would be now."""


@dataclass(eq=False)
class Segment:
    """An immutable stand-in for some tokens of a prompt, behind the segments that it was made behind."""

    key: bytes
    parent: bytes  # the key of the segment before it, or the root; empty for one that nobody may find
    first: int  # block that it begins with
    blocks: int  # that its tokens took
    tokens: int  # that it stands for
    packed: list[KVCacheBlock]
    effort: str  # that it took
    error: float  # held-out
    shared: bool  # its blocks are hashed, so that it is found by others and outlives its holders
    read_for: str = ""  # the request that it was read from the store for
    before: Before | None = field(default_factory=list)  # what windows held before its end; None: not all is known
    serial: int = field(default_factory=count().__next__)  # tells it from another one of the same key
    holders: set[str] = field(default_factory=set)  # requests whose block lists have it
    alive: bool = True

    def row(self, null_block: KVCacheBlock) -> list[KVCacheBlock]:
        """What stands in a block list in the place of its tokens' blocks."""
        return self.packed + [null_block] * (self.blocks - len(self.packed))

    def renew(self, before: Before | None) -> None:
        """Let others go on from what windows hold of a request that has computed the same tokens, if they cannot go on
        from what was known.
        """
        if before is not None and not are_there(self.before):
            self.before = before

    @property
    def end(self) -> int:
        """The block behind it."""
        return self.first + self.blocks

    @property
    def name(self) -> BlockHash:
        """The hash that blocks behind it are named after, so that only requests that begin with it find them: not those
        that begin with another one, made later for the same tokens.
        """
        return BlockHash(hashlib.sha256(self.key + self.serial.to_bytes(8, "little")).digest())


def end_of(chain: list[Segment]) -> int:
    """The block behind a chain."""
    return chain[-1].end if chain else 0


def packed_in(chain: list[Segment]) -> int:
    """Blocks that a chain's entries take."""
    return sum(len(segment.packed) for segment in chain)


def keys(parent: bytes, tokens: Sequence[int], first: int, lengths: list[int]) -> Iterator[bytes]:
    """Names of the segments behind `parent` that would stand for so many tokens from position `first` on."""
    digest, done = hashlib.sha256(parent), first
    for length in lengths:
        digest.update(array("i", tokens[done : first + length]).tobytes())
        done = first + length
        yield digest.digest()


class Segments:
    """All of them, and the chains that requests hold."""

    def __init__(
        self,
        pool: BlockPool,
        model: str,
        calibration: str,
        block_size: int,
        most: int,
        adapter: Callable[[LoRARequest], Any],
    ) -> None:
        """`model` and `calibration` are what entries depend on besides a request's settings, and what `adapter` says of
        a LoRA adapter; `most` segments are kept, as a worker's directory has room for no more.
        """
        self._pool, self._block_size, self._most, self._adapter = pool, block_size, most, adapter
        self._of_server = [FORMAT, model, calibration, block_size]
        self._by_key: dict[bytes, Segment] = {}  # the oldest first
        self._held: dict[str, list[Segment]] = {}
        self._lengths: dict[bytes, Counter[int]] = {}  # of the shared ones, by what they follow
        self._gone: list[int] = []
        self.version = 0  # how many were made
        self.evicted = 0  # of the shared ones

    def __len__(self) -> int:
        return len(self._by_key)

    def root(self, request: Request, config: CompressionConfig) -> bytes | None:
        """What a chain's names begin with: everything but tokens that its entries depend on, and who may share it.

        Not the effort: a segment that took more serves those who asked for less. None for a prompt whose tokens do not
        tell all of it.
        """
        told_by_tokens = request.prompt_token_ids is not None and request.prompt_embeds is None
        if not self._pool.enable_caching or not told_by_tokens or request.mm_features:
            return None
        lora = request.lora_request
        kept: Any = config.keep_tokens or config.keep_ratio  # an integer or a float, which JSON tells apart
        if config.kept_of_answers is not None:
            kept = [config.keep_ratio, config.kept_of_answers]
        parts = [
            *(*self._of_server, config.method, kept, config.budget, config.sink, config.window),
            None if lora is None else self._adapter(lora),
            request.cache_salt,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).digest()

    @staticmethod
    def key(parent: bytes, request: Request, first: int, end: int) -> bytes:
        """The name of the segment behind `parent` that stands for a request's tokens from position `first` to `end`."""
        return next(keys(parent, request.all_token_ids, first, [end - first]))

    def find(self, request: Request, config: CompressionConfig, most: int) -> list[Segment]:
        """The chain that serves a prompt and stands for at most `most` of its tokens; empty if there is none."""
        root, chain = self.root(request, config), []
        if root is not None:
            parent, first = root, 0
            while (segment := self.after(parent, request, config, first, most)) is not None:
                chain.append(segment)
                parent, first = segment.key, first + segment.tokens
        return chain

    def after(
        self, parent: bytes, request: Request, config: CompressionConfig, first: int, most: int
    ) -> Segment | None:
        """The longest segment behind `parent` that serves a request and stands for its tokens from position `first` to
        `most` at most.
        """
        lengths = sorted(n for n in self._lengths.get(parent, ()) if first + n <= most)
        for key in reversed(list(keys(parent, request.all_token_ids, first, lengths))):
            segment = self._by_key.get(key)
            if segment is not None and config.accepts(segment.effort, segment.error):
                return segment
        return None

    def add(self, segment: Segment, first_holder: str | None) -> None:
        """A segment that was just made, for a request, or read from the store, for whoever comes: its blocks are the
        caller's to free then.
        """
        if segment.shared and (older := self._by_key.get(segment.key)) is not None:
            if order(older.effort) >= order(segment.effort) and older.error <= segment.error:
                segment.shared = False  # made twice at once: the older one is found
                older.renew(segment.before)
            else:  # a better one takes its place; who holds the older one keeps that
                self._unshare(older)
        if segment.shared:
            for i, block in enumerate(segment.packed):
                name = hashlib.sha256(segment.name + i.to_bytes(4, "little")).digest()
                insert_hash(self._pool, BlockHash(name), block)
                when_reused(self._pool, block, lambda _: self._end(segment))
            self._by_key[segment.key] = segment
            self._lengths.setdefault(segment.parent, Counter())[segment.tokens] += 1
        self.version += 1
        if first_holder is not None:
            self.hold(segment, first_holder)
        elif not segment.shared:
            self._end(segment)
        for old in list(self._by_key.values()):
            if len(self._by_key) <= self._most:
                break
            if not old.holders and old is not segment:
                self._end(old)

    def hold(self, segment: Segment, request_id: str) -> None:
        """The request's block list has it from now on, behind those that it has."""
        segment.holders.add(request_id)
        self._held.setdefault(request_id, []).append(segment)
        if segment.shared:  # the one used last goes last
            self._by_key[segment.key] = self._by_key.pop(segment.key)

    def chain_of(self, request_id: str) -> list[Segment]:
        """What a request's block list begins with."""
        return self._held.get(request_id, [])

    def release(self, request_id: str) -> None:
        """The request loses its blocks; one that holds no segment is fine."""
        for segment in self._held.pop(request_id, []):
            segment.holders.discard(request_id)
            if not segment.holders and not segment.shared:
                self._end(segment)

    def has(self, segment: Segment) -> bool:
        """Whether a segment, or another make of it, can be found."""
        return segment.key in self._by_key

    def drop(self, segment: Segment) -> bool:
        """Forget a segment that may be found and that nobody holds; returns whether it was so."""
        found = self._by_key.get(segment.key)
        if found is None or found.holders:
            return False
        self._end(found)
        return True

    def gone(self) -> list[int]:
        """First blocks of the segments that have ended since the last call: what they hold now is something else."""
        gone, self._gone = self._gone, []
        return gone

    def alive(self) -> Iterator[Segment]:
        """Those that somebody holds or may find."""
        held = (segment for chain in self._held.values() for segment in chain)
        yield from {id(segment): segment for segment in (*self._by_key.values(), *held)}.values()

    def _end(self, segment: Segment) -> None:
        """One of its blocks is another's now, or it is not wanted any more."""
        if not segment.alive:
            return
        segment.alive = False
        self._gone.append(segment.packed[0].block_id)
        if segment.shared:
            self.evicted += 1
            self._unname(segment)

    def _unshare(self, segment: Segment) -> None:
        """Nobody finds it any more; it ends with its last holder."""
        if not segment.holders:
            self._end(segment)
            return
        segment.shared = False
        self._unname(segment)

    def _unname(self, segment: Segment) -> None:
        del self._by_key[segment.key]
        lengths = self._lengths[segment.parent]
        lengths[segment.tokens] -= 1
        if not lengths[segment.tokens]:
            del lengths[segment.tokens]
        if not lengths:
            del self._lengths[segment.parent]
        self._pool.evict_blocks({block.block_id for block in segment.packed})
