"""What a waiting prompt finds in the prefix cache, whether it is admitted, and how much of it is computed at once."""

from __future__ import annotations

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request, RequestStatus

from kvsculpt_vllm.engine.compat.scheduler import GROUP, name_by_tokens, name_from
from kvsculpt_vllm.engine.scheduler.known_requests import KnownRequests
from kvsculpt_vllm.engine.scheduler.segments import Segment
from kvsculpt_vllm.engine.scheduler.story import Story
from kvsculpt_vllm.engine.shared import spans
from kvsculpt_vllm.engine.shared.commands import Settled
from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.engine.shared.record import printable

logger = init_logger("vllm.kvsculpt")


class PrefixHits(KnownRequests):
    """The answers to what vLLM's scheduler asks of a prompt before it is computed."""

    def find_prefix(self, request: Request) -> tuple[KVCacheBlocks, int] | None:
        """The segment that a prompt begins with, and what follows it in the prefix cache."""
        request_id = request.request_id
        before = self._found.pop(request_id, None)  # a waiting request is looked up anew at every step
        segment = self._segment_for(request)
        if segment is None or segment is not before:
            if request_id in self._renamed:
                self._renamed.discard(request_id)
                name_by_tokens(request)
            if segment is None:
                return None
            self._rename(request)
            name_from(request, segment.blocks, segment.name)
        self._found[request_id] = segment
        self._shortened.pop(request_id, None)
        self._shared.discard(request_id)
        pool = self.kv_cache_manager.block_pool
        row = segment.row(pool.null_block)
        for block_hash in request.block_hashes[segment.blocks : (request.num_tokens - 1) // self.block_size]:
            if (cached := pool.get_cached_block(block_hash, [GROUP])) is None:
                break
            row += cached
        return KVCacheBlocks((row,)), len(row) * self.block_size

    def _segment_for(self, request: Request) -> Segment | None:
        span = self._span(request)
        if isinstance(span, Reason) or not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return None
        return self._segments.find(request, self._config(request), span.tokens)

    def _rename(self, request: Request) -> None:
        """The names of its blocks are about to change."""
        self._renamed.add(request.request_id)
        self._stock_blocks.keep_names(request)

    def limit_prefix_hit(self, request: Request, blocks: KVCacheBlocks, num_tokens: int) -> tuple[KVCacheBlocks, int]:
        """Shorten a prefix-cache hit of a prompt to be compressed: without queries there is nothing to fit to.

        Not where others hold so many of its blocks that its compression would free no more than it takes: then it uses
        all that was found, as in stock vLLM, and stays exact.
        """
        request_id = request.request_id
        self._shared.discard(request_id)  # a waiting request is looked up anew at every step
        first_time = self._shortened.pop(request_id, None) is None
        if num_tokens == 0 or isinstance(span := self._span(request), Reason):
            return blocks, num_tokens
        most = spans.longest_useful_hit(request.num_prompt_tokens, self.block_size)
        if num_tokens <= most:
            return blocks, num_tokens
        (found,) = blocks.blocks
        held = sum(block.ref_cnt > 0 for block in found[: span.blocks])
        if not span.pays(span.blocks - held):
            self._shared.add(request_id)
            return blocks, num_tokens
        self._shortened[request_id] = {block.block_id for block in found[most // self.block_size :]}
        if first_time:
            logger.info(
                "kvsculpt: request %s: prefix-cache hit shortened from %d to %d of %d prompt tokens, "
                "so that its last queries are seen",
                printable(request.request_id),
                num_tokens,
                most,
                request.num_prompt_tokens,
            )
        return self.kv_cache_manager.truncate_computed_blocks(blocks, most), most

    def admits(self, request: Request, hit: KVCacheBlocks | None) -> bool:
        """Whether a prompt fits beside the blocks that the next compression takes before it frees any.

        Without, a prompt could take the last blocks: nothing could be compressed any more, and the answers being
        written would soon need blocks that only a preemption gives. The largest compression's blocks will do for all
        that are to come, as each frees more than it takes; one that does not is not waited for. A block for every
        answer to grow into is a margin: it may grow by more. Where nothing else runs there is nothing to wait for.
        """
        if request.status == RequestStatus.RUNNING or not self.running:
            return True
        to_come = [r for r in self.running if r.request_id not in self._settled]
        new = () if request.request_id in self._found else (request,)
        planned = [span for r in (*new, *to_come) if isinstance(span := self._span(r), spans.Span)]
        planned = [span for span in planned if 2 * span.packed_blocks < span.blocks]
        if not planned:
            return True
        shared = sum(block.is_null or block.ref_cnt > 0 for block in hit.blocks[0]) if hit is not None else 0
        prompt = -(-request.num_tokens // self.block_size) - shared
        # What prompts that are computed in chunks have still to get.
        begun = sum(
            max(0, -(-r.num_tokens // self.block_size) - len(self.block_lists.of(r.request_id)))
            for r in self.running
            if r.num_computed_tokens < r.num_prompt_tokens
        )
        needed = prompt + begun + max(span.packed_blocks for span in planned) + len(self.running) + 1
        return needed <= self.kv_cache_manager.block_pool.get_num_free_blocks()

    def got_blocks(self, request: Request) -> None:
        """A segment that was found is held from now on. The blocks that a prompt computes anew leave the prefix cache:
        those of the same content that it fills now take their place, so that whoever comes next shares them with it.
        """
        if segment := self._found.pop(request.request_id, None):
            self._hold(request, segment, Reason.CACHED)
        if blocks := self._shortened.pop(request.request_id, None):
            pool = self.kv_cache_manager.block_pool
            pool.evict_blocks({block for block in blocks if pool.blocks[block].ref_cnt == 0})

    def _hold(self, request: Request, segment: Segment, reason: Reason) -> None:
        """A request begins with a segment that it did not make."""
        request_id = request.request_id
        self._segments.hold(segment, request_id)
        self._shared.discard(request_id)
        self._settled.add(request_id)
        self._compressed.add(request_id)
        self._news.append(Settled(request_id, request.num_prompt_tokens, reason.outcome, reason))
        self._stories[request_id] = Story(
            reason.outcome,
            reason,
            tokens_found=segment.tokens,
            entries_held=len(segment.packed) * self.block_size,
            held_out_error=segment.error,
        )

    def limit_chunk(self, request: Request, num_left: int, num_tokens: int) -> int:
        """Tokens to compute now: none while the request is compressed and alone, so that its answer is not over before
        anything could read the packed prefix; and such that no single token is left for a prompt's last chunk.

        On a GPU such a chunk runs as a decode, from a recorded graph, where its query is not sampled. A chunk that is
        itself one token is let through: a prompt that stays exact is better than one that waits.
        """
        pending = self._pending.get(request.request_id)
        if pending is not None and not pending.solved and self._alone:
            return 0
        if num_left != 1 or num_tokens < 2 or isinstance(self._span(request), Reason):
            return num_tokens
        return num_tokens - 1
