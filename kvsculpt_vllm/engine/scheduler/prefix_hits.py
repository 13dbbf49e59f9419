"""What a waiting prompt finds in the prefix cache, whether it is admitted, and how much of it is computed at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request, RequestStatus

from kvsculpt_vllm.engine.compat.scheduler import name_by_tokens, name_from
from kvsculpt_vllm.engine.scheduler.segments import Segment, end_of
from kvsculpt_vllm.engine.scheduler.store_hits import StoreHits
from kvsculpt_vllm.engine.scheduler.story import Story
from kvsculpt_vllm.engine.shared import spans
from kvsculpt_vllm.engine.shared.commands import Settled
from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.engine.shared.record import printable

logger = init_logger("vllm.kvsculpt")


class PrefixHits(StoreHits):
    """The answers to what vLLM's scheduler asks of a prompt before it is computed."""

    def find_prefix(self, request: Request) -> tuple[KVCacheBlocks, int] | None:
        """The chain that a prompt begins with, and what follows it in the prefix cache."""
        request_id = request.request_id
        last_time = self._found.pop(request_id, [])  # a waiting request is looked up anew at every step
        if request_id not in self._rewound:
            self._samples.release(request_id)  # what it reserved in a step in which it was not admitted
        chain = self._chain_for(request)
        if not chain or not last_time or chain[-1] is not last_time[-1]:
            if request_id in self._renamed:
                self._renamed.discard(request_id)
                name_by_tokens(request)
            if not chain:
                return None
            self._rename(request)
            name_from(request, chain[-1].end, chain[-1].name)
        self._found[request_id] = chain
        self._shortened.pop(request_id, None)
        self._shared.discard(request_id)
        pool = self.kv_cache_manager.block_pool
        row = [block for segment in chain for block in segment.row(pool.null_block)]
        before, tail = chain[-1].before, []
        assert before is not None  # as `_chain_for` says
        for block_hash in request.block_hashes[len(row) : (request.num_tokens - 1) // self.block_size]:
            if (cached := pool.get_cached_block(block_hash, [self.block_lists.group])) is None:
                break
            tail += cached
        end, used = len(row), self._windows.longest(request, before, len(row), len(tail))
        used = used if self._uses(request, chain, used) else 0
        row += tail[:used]
        windows = self._windows.rows(request, before, end, used)
        return KVCacheBlocks(self._windows.all_groups(row, windows)), len(row) * self.block_size

    def _uses(self, request: Request, chain: list[Segment], tail: int) -> bool:
        """Whether a prompt uses so many blocks behind its chain that are found in the cache.

        Their queries are not seen, so that no segment can be made of them before they are computed again, with all that
        is new: after the first token, which comes sooner for them. Where much is new they are computed now.
        """
        if request.request_id in self._rewound or self._cannot_be_exact(request) or self._wish(request):
            return False
        new = request.num_tokens - (chain[-1].end + tail) * self.block_size
        again = max(self._config(request).segment_tokens // 2, tail * self.block_size)
        return not self._is_long_enough(request, chain) or new <= again

    def _is_long_enough(self, request: Request, chain: list[Segment]) -> bool:
        """Whether what lies behind a chain is to become a segment."""
        config = self._config(request)
        return 0 < config.decode <= request.num_tokens - config.window - end_of(chain) * self.block_size

    def _rename(self, request: Request) -> None:
        """The names of its blocks are about to change."""
        self._renamed.add(request.request_id)
        self._stock_blocks.keep_names(request)

    def limit_prefix_hit(self, request: Request, blocks: KVCacheBlocks, num_tokens: int) -> tuple[KVCacheBlocks, int]:
        """Use nothing of a prefix-cache hit of a prompt to be compressed: a segment is fitted to the queries of all its
        positions, and what is found in the cache has none.

        Not where others hold so many of its blocks that its compression would free no more than it takes: then it uses
        all that was found, as in stock vLLM, and stays exact until a segment is made that it can adopt.
        """
        request_id = request.request_id
        self._shared.discard(request_id)  # a waiting request is looked up anew at every step
        first_time = self._shortened.pop(request_id, None) is None
        if num_tokens == 0 or (span := self._span_behind(request, [])) is None:
            return blocks, num_tokens
        found = blocks.blocks[self.block_lists.group]
        held = sum(block.ref_cnt > 0 for block in found[: span.blocks])
        if not (span.pays(span.blocks - held) or self._cannot_be_exact(request) or self._wish(request)):
            self._shared.add(request_id)
            return blocks, num_tokens
        self._shortened[request_id] = {block.block_id for block in found}
        if first_time:
            logger.info(
                "kvsculpt: request %s: a prefix-cache hit of %d of its %d tokens is not used, so that their queries "
                "are seen",
                printable(request.request_id),
                num_tokens,
                request.num_tokens,  # what it has answered before it is computed again, too
            )
        return self.kv_cache_manager.empty_kv_cache_blocks, 0

    def admits(self, request: Request, hit: KVCacheBlocks | None) -> bool:
        """Whether a prompt fits beside the blocks that the next compression takes before it frees any.

        Without, a prompt could take the last blocks: nothing could be compressed any more, and the answers being
        written would soon need blocks that only a preemption gives. The largest compression's blocks will do for all
        that are to come, as each frees more than it takes; one that does not is not waited for. A block for every
        answer to grow into is a margin: it may grow by more. Where nothing else runs there is nothing to wait for.
        """
        if request.status == RequestStatus.RUNNING or not self.running:
            return True
        if self.waits_for_room(request):
            return False
        own = self._span_behind(request, self._found.get(request.request_id, []))
        to_come = [own, *(self._next_span(r) for r in self.running if r.request_id not in self._failed)]
        planned = [span for span in to_come if span is not None and 2 * span.packed_blocks < span.blocks]
        if not planned:
            return True
        found = hit.blocks[self.block_lists.group] if hit is not None else ()
        needed = self._blocks_to_come(request, len(found))
        needed += sum(not block.is_null and block.ref_cnt == 0 for block in found)
        needed += self._begun(self.running) + max(span.packed_blocks for span in planned) + len(self.running) + 1
        return needed <= self.kv_cache_manager.block_pool.get_num_free_blocks()

    def makes_room(self, request: Request) -> bool:
        """Whether a pinned prefix gave up its blocks for a request beside which nobody runs: what fits into the memory
        is served.
        """
        return all(other is request for other in self.running) and self._prefixes.give_way()

    def _begun(self, requests: Iterable[Request]) -> int:
        """Blocks that those of the running requests have still to get that are computed in chunks."""
        return sum(
            self._blocks_to_come(request, len(self.block_lists.of(request.request_id)))
            for request in requests
            if not self._is_computed(request)
        )

    def _blocks_to_come(self, request: Request, has: int) -> int:
        """Blocks that a prompt whose list has so many entries takes besides, at most: once its segments are made while
        it is computed, they give more than the next one needs.
        """
        blocks = -(-self._num_known(request) // self.block_size)
        left, windows = max(0, blocks - has), self._windows.to_come(request.request_id, blocks)
        if self._why_exact(request) is not None or not self._is_made_meanwhile(request):
            return left + windows
        config = self._config(request)
        return min(left, spans.most_blocks(config, self._num_known(request), self.block_size)) + windows

    def fits_as_it_is_computed(self, request: Request) -> bool:
        """Whether vLLM need not find room for all of a prompt before it computes any: its segments are made meanwhile,
        and `admits` reckons with what they take.
        """
        return self._why_exact(request) is None and self._is_made_meanwhile(request)

    def _is_made_meanwhile(self, request: Request) -> bool:
        """Whether segments are made while the prompt is computed: not where its own log-probabilities are asked for,
        which are exact.
        """
        return request.sampling_params is not None and request.sampling_params.prompt_logprobs is None

    def got_blocks(self, request: Request) -> None:
        """A chain that was found is held from now on. The blocks that a prompt computes anew leave the prefix cache:
        those of the same content that it fills now take their place, so that whoever comes next shares them with it.
        """
        request_id = request.request_id
        if request_id not in self._known:
            found = request_id in self._found
            if request.num_preemptions == 0 and (found or self._why_exact(request) is None):
                self._count(hits=int(found), misses=int(not found))
                if not self._wish(request):
                    self._prefixes.used(self._found.get(request_id, ()))
            self._known[request_id] = request.num_tokens
            self._rewound.discard(request_id)
        if chain := self._found.pop(request_id, None):
            self._hold(request, chain, Reason.CACHED)
        if blocks := self._shortened.pop(request_id, None):
            pool = self.kv_cache_manager.block_pool
            pool.evict_blocks({block for block in blocks if pool.blocks[block].ref_cnt == 0})

    def _hold(self, request: Request, segments: list[Segment], reason: Reason) -> None:
        """A request's block list has segments that it did not make now, or that it made before it lost its blocks."""
        request_id = request.request_id
        for segment in segments:
            self._segments.hold(segment, request_id)
        self._shared.discard(request_id)
        self._spans.pop(request_id, None)
        story = self._stories.get(request_id, Story(reason.outcome, reason))
        if request_id not in self._told and not (story.tokens_found or story.tokens_sculpted):
            self._news.append(Settled(request_id, request.num_prompt_tokens, reason.outcome, reason))
        self._told.add(request_id)
        found = sum(segment.tokens for segment in segments)
        if reason == Reason.CACHED and request.num_preemptions == 0:
            self._count(tokens_found=found)
        if reason == Reason.ADOPTED:
            self._count(adopted=len(segments), tokens_found=found)
            story = replace(story, tokens_found=story.tokens_found + found)
        elif not story.tokens_sculpted:  # else it finds its own again, after it lost its blocks
            story = replace(story, tokens_found=found)
        read = sum(segment.tokens for segment in segments if segment.read_for == request_id)
        story = replace(story, tokens_read=max(story.tokens_read, read))
        self._stories[request_id] = story

    def limit_chunk(self, request: Request, first: int, num_tokens: int) -> int:
        """Tokens to compute now, of `num_tokens` from position `first` on.

        None while the end of a prompt is compressed and alone, so that its answer is not over before anything could
        read the segment; nor while a prefix is sculpted that wants no answer. No more than there is room for, of
        queries and of blocks, while its segments are made. And never a single one, if a step can be waited for: on a
        GPU a chunk of one token runs as a decode, from a recorded graph, where its query is not sampled.
        """
        request_id, left = request.request_id, request.num_tokens - first - num_tokens
        if request.status == RequestStatus.RUNNING and first >= self._num_known(request):
            if self._wish(request) and self._next_span(request) is not None and request_id not in self._failed:
                return 0  # it has nothing to do but to wait for its segments
            pending = self._pending.get(request_id)
            return 0 if pending is not None and not pending.solved and self._alone else num_tokens
        if self._why_exact(request) is not None:
            return num_tokens
        if self._is_made_meanwhile(request):
            most = self._most_tokens(request, first)
            num_tokens, left = min(num_tokens, most), left + max(0, num_tokens - most)
        if left == 1:
            num_tokens, left = num_tokens - 1, 2
        return 0 if num_tokens == 1 and left else num_tokens

    def _most_tokens(self, request: Request, first: int) -> int:
        """Tokens that there is room for from position `first` on, while a request's segments are made."""
        request_id = request.request_id
        if request.status == RequestStatus.RUNNING:
            span, held = self._next_span(request), len(self.block_lists.of(request_id))
        else:
            span = self._span_behind(request, self._found.get(request_id, []))
            held = first // self.block_size
        if span is None or request_id in self._failed or request_id in self._refused:
            return request.num_tokens - first
        needed = self._needed_for(request, span)
        if first == span.first_token:
            if not (request_id in self._samples or self._samples.has_room(needed - first)):
                if first or self._cannot_be_exact(request) or self._wish(request):
                    return 0  # until others' segments are made
                self._refused.add(request_id)
                return request.num_tokens - first
            self._samples.begin(request_id, first, needed - first)
        most = self._samples.most(request_id) if request_id in self._samples else request.num_tokens
        # Its own growth is not to take the blocks that its next segment needs, as long as they are there.
        free, own = self.kv_cache_manager.block_pool.get_num_free_blocks(), span.packed_blocks
        has_to = self._cannot_be_exact(request)
        if has_to:  # a segment that loses too much is made again with twice as many
            own = min(2 * own, span.blocks)
        elif request_id in self._pending:
            own = 0
        # Windows take a block each besides, until those that are passed come free.
        affordable = (held + max(0, free - own) // (1 + len(self._windows))) * self.block_size
        if free < own and not has_to:
            affordable = request.num_tokens  # it goes on uncompressed
        most = min(most, affordable if first >= needed else max(affordable, needed)) - first
        return max(2, most) if first < needed else max(0, most)  # one alone is not computed
