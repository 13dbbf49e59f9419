"""Segments that a waiting prompt finds in the store: looked up and read beside the path of requests, then in the pool.

Once they are in the pool, they are segments like any others: a prompt finds them as it finds those of other requests.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.scheduler.known_requests import KnownRequests
from kvsculpt_vllm.engine.scheduler.segments import Segment, end_of, keys
from kvsculpt_vllm.engine.scheduler.store_marks import StoreMarks
from kvsculpt_vllm.engine.scheduler.windows import are_there
from kvsculpt_vllm.engine.shared import stores
from kvsculpt_vllm.engine.shared.commands import CancelLoadCommand, LoadCommand, Loaded, StoreState
from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.engine.shared.record import printable
from kvsculpt_vllm.store.background import StoreAway
from kvsculpt_vllm.store.names import StoredName
from kvsculpt_vllm.store.store import Store

logger = init_logger("vllm.kvsculpt")

LOOK_UPS = 4
"""How often a prompt is looked up in the store, at most: again only where the chain in the pool has changed since."""


@dataclass
class LookUp:
    """What is known of a waiting prompt's segments in the store."""

    parent: bytes  # the key, or the root, that was looked behind
    answer: Future[list[StoredName]] | None  # None once it is heard
    found: list[StoredName] = field(default_factory=list)  # one behind the other
    times: int = 1


@dataclass
class Load:
    """Segments that are being read into blocks of the pool."""

    number: int
    request_id: str
    first: int  # block that they begin with
    names: list[StoredName]
    packed: list[list[KVCacheBlock]]


def stored_chain(
    store: Store,
    ranks: int,
    block_size: int,
    parent: bytes,
    tokens: Sequence[int],
    first: int,
    most: int,
    config: CompressionConfig,
) -> list[StoredName]:
    """The segments in the store that follow `parent` and stand for `tokens` from position `first` to `most` at most: at
    each step the longest that serves such a request.
    """
    chain: list[StoredName] = []
    while True:
        there = [
            name
            for name in store.find(parent, ranks)
            if first + name.tokens <= most
            and config.accepts(name.effort, name.error)
            and 0 < name.blocks * block_size <= name.tokens
            and not name.tokens % block_size
        ]
        lengths = sorted({name.tokens for name in there})
        wanted = dict(zip(lengths, keys(parent, tokens, first, lengths), strict=True))
        fitting = [name for name in there if name.key == wanted[name.tokens]]
        if not fitting:
            return chain
        best = max(fitting, key=lambda name: (name.tokens, name.quality))
        chain.append(best)
        parent, first = best.key, first + best.tokens


class StoreHits(KnownRequests):
    """Has segments that waiting prompts need read from the store, and says which are written to it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        parallel = self.vllm_config.parallel_config
        self._ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        # The first engine of several (data parallel) is enough to keep it in bounds.
        self._store = stores.opened(self.compression)
        self._marks = None if self._store is None else StoreMarks(self._store)
        self._look_ups: dict[str, LookUp] = {}
        self._load: Load | None = None
        self._loads = count()
        self._new_loads: list[LoadCommand | CancelLoadCommand] = []
        self._store_told = StoreState()

    def is_awaited(self, request: Request) -> bool:
        """Whether a waiting prompt is not begun yet, because its segments are being read from the store."""
        # One that lost its blocks comes back at once, to the room that it was let go for.
        if self._store is None or request.num_preemptions or not self._looks_for_chains(request):
            return False
        look_up = self._look_ups.get(request.request_id)
        if look_up is not None and look_up.answer is not None:
            if not look_up.answer.done():
                return True
            look_up.found, look_up.answer = self._heard(look_up.answer), None
            self._count(store_hits=int(bool(look_up.found)), store_misses=int(not look_up.found))
        chain = self._chain_for(request)
        if self._marks is not None:
            self._marks.used(chain)
        parent = chain[-1].key if chain else self._segments.root(request, self._config(request))
        if parent is None or not self._names.last(request.lora_request):
            return False
        if look_up is not None:
            look_up.found = _behind(parent, look_up.found)  # the chain in the pool may have changed since
        if look_up is None or (not look_up.found and look_up.parent != parent and look_up.times < LOOK_UPS):
            return self._look_up(request, parent, end_of(chain), 1 if look_up is None else look_up.times + 1)
        if not look_up.found:
            return False
        return self._load is not None or self._begin_load(request, look_up.found, end_of(chain))

    def waits_for_room(self, request: Request) -> bool:
        """Whether segments in the store wait for blocks that others hold: until they have them, nobody overtakes."""
        look_up = self._look_ups.get(request.request_id)
        return bool(look_up and look_up.answer is None and look_up.found and self.running)

    def _look_up(self, request: Request, parent: bytes, first_block: int, times: int) -> bool:
        """Have a prompt looked up behind the chain in the pool; returns whether that is worth it."""
        config, first = self._config(request), first_block * self.block_size
        most = request.num_tokens - config.window
        if most - first < min(config.min_tokens, config.segment_tokens):
            return False
        assert self._store is not None
        tokens, ranks, block_size = request.all_token_ids[:most], self._ranks, self.block_size

        def walk(store: Store) -> list[StoredName]:
            return stored_chain(store, ranks, block_size, parent, tokens, first, most, config)

        self._look_ups[request.request_id] = LookUp(parent, self._store.submit(walk), times=times)
        return True

    def _looks_for_chains(self, request: Request) -> bool:
        """Whether a prompt may begin with a chain that is found."""
        # An answer that is too short to have its prompt compressed is not too short to find it.
        wanted = self._why_exact(request) in (None, Reason.FEW_OUTPUT_TOKENS)
        return wanted and self.kv_cache_manager.prefix_cache_lookup_enabled(request)

    def _chain_for(self, request: Request) -> list[Segment]:
        """The chain in the pool that serves a waiting prompt."""
        if not self._looks_for_chains(request):
            return []
        config = self._config(request)
        chain = self._segments.find(request, config, request.num_tokens - config.window)
        while chain and not are_there(chain[-1].before):
            chain.pop()
        return chain

    @staticmethod
    def _heard(answer: Future[list[StoredName]]) -> list[StoredName]:
        """What was found. A store that is gone has told the log, and has nothing."""
        try:
            return answer.result()
        except (StoreAway, OSError):
            return []
        except Exception:  # a look-up that fails is a miss, whatever it failed by
            logger.exception("kvsculpt: a look-up in the store failed")
            return []

    def _begin_load(self, request: Request, found: list[StoredName], first: int) -> bool:
        """Take blocks for what was found behind block `first`, as far as there are some, and have it read. Returns
        whether it is.
        """
        pool = self.kv_cache_manager.block_pool
        free, names = pool.get_num_free_blocks(), []
        for name in found:
            if name.blocks > free:
                break
            names.append(name)
            free -= name.blocks
        if not names:
            if not self.running:
                found.clear()  # nobody will free any: it is computed
            return False
        packed = [pool.get_new_blocks(name.blocks) for name in names]
        self._load = Load(next(self._loads), request.request_id, first, names, packed)
        ids = [[block.block_id for block in blocks] for blocks in packed]
        self._new_loads.append(LoadCommand(self._load.number, names, ids))
        logger.info(
            "kvsculpt: request %s: %d tokens of its prompt are read from the store",
            printable(request.request_id),
            sum(name.tokens for name in names),
        )
        return True

    def _cancel_load(self) -> None:
        """Give back the blocks of the load in flight. That is safe at once: the workers hear of it before the step in
        which somebody else may write to them.
        """
        load, self._load = self._load, None
        if load is None:
            return
        self._new_loads.append(CancelLoadCommand(load.number, [blocks[0].block_id for blocks in load.packed]))
        for blocks in load.packed:
            self.kv_cache_manager.block_pool.free_blocks(reversed(blocks))

    def _take_new_loads(self) -> list[LoadCommand | CancelLoadCommand]:
        commands, self._new_loads = self._new_loads, []
        return commands

    def _hear_loaded(self, loaded: Loaded) -> None:
        """What could be read is in the pool's prefix cache from now on."""
        if self._load is None or self._load.number != loaded.number:
            return  # it was cancelled since
        load, self._load = self._load, None
        pool, first, look_up = self.kv_cache_manager.block_pool, load.first, self._look_ups.get(load.request_id)
        for name, blocks in zip(load.names[: loaded.usable], load.packed, strict=False):
            segment = Segment(
                key=name.key,
                parent=name.parent,
                first=first,
                blocks=name.tokens // self.block_size,
                tokens=name.tokens,
                packed=blocks,
                effort=name.effort,
                error=name.error,
                shared=True,
                read_for=load.request_id,
            )
            self._segments.add(segment, None)
            first = segment.end
        for blocks in reversed(load.packed):  # a chain's end is evicted first
            pool.free_blocks(reversed(blocks))
        self._count(read=loaded.usable, unreadable=len(load.names) - loaded.usable)
        if look_up is not None:
            look_up.found = look_up.found[len(load.names) :]  # what is evicted at once is not read a second time
        if loaded.usable < len(load.names):
            unusable = load.names[loaded.usable]
            assert self._store is not None
            if loaded.broken:
                self._store.avoid(unusable, self._ranks)
            # It is computed, and what follows it, by whoever waits for it.
            for waiting in self._look_ups.values():
                if unusable in waiting.found:
                    waiting.found = waiting.found[: waiting.found.index(unusable)]
            if look_up is not None:
                look_up.found = []

    def _name_to_store(self, request: Request, segment: Segment) -> StoredName | None:
        """What a segment that was just made is called in the store; None where it is not written."""
        lasts = self._names.last(request.lora_request)
        if self._store is None or not self._store.writable or not segment.shared or not lasts:
            return None
        made = secrets.token_hex(4)
        return StoredName(
            segment.parent, segment.key, segment.tokens, len(segment.packed), segment.effort, segment.error, made
        )

    def _take_news(self) -> list[Any]:
        news: list[Any] = super()._take_news()
        if self._store is not None:
            counts = self._store.counts()
            state = StoreState(counts.failures, counts.unanswered, counts.away)
            if state != self._store_told:
                self._store_told = state
                news.append(state)
        return news

    def forget(self, request: Request) -> None:
        """See `KnownRequests`. Its load ends with a request: nobody may come that it would serve."""
        super().forget(request)
        if request.is_finished():
            self._look_ups.pop(request.request_id, None)
            if self._load is not None and self._load.request_id == request.request_id:
                self._cancel_load()

    def shutdown(self) -> None:
        """See vLLM's."""
        if self._store is not None:
            self._store.close(0)
        super().shutdown()


def _behind(parent: bytes, names: list[StoredName]) -> list[StoredName]:
    """The part of a chain that follows `parent`; empty if it does not lie in it."""
    return next((names[i:] for i, name in enumerate(names) if name.parent == parent), [])
