"""What follows a chain becomes a segment, too, once it is long: its request is computed again from the chain on."""

from __future__ import annotations

import time

from vllm.v1.request import Request

from kvsculpt_vllm.engine.scheduler.prefix_hits import PrefixHits
from kvsculpt_vllm.engine.scheduler.segments import end_of, packed_in
from kvsculpt_vllm.engine.scheduler.windows import are_there
from kvsculpt_vllm.engine.shared import capacity, spans
from kvsculpt_vllm.engine.shared.reasons import Reason


class LongTails(PrefixHits):
    """Says which running requests give up their tail, and lets them."""

    def _rewind_long_tails(self) -> None:
        """Let requests whose tail has grown by --kv-compression-decode give up the blocks behind their chain.

        Nobody has seen the queries of what was written, or found in the cache, or computed while there was no room for
        them. The request is preempted, finds its chain, computes what follows as a prefill, and is compressed again.
        """
        # One at a time: each is to find the room that it was let go for.
        if not self._rewinds or self._rewound:
            return
        for request in self.running:
            if self._is_to_be_rewound(request):
                first = end_of(self._segments.chain_of(request.request_id)) * self.block_size
                self.running.remove(request)
                self._preempt_request(request, time.monotonic())
                self._samples.begin(request.request_id, first, request.num_tokens - first)
                # It may come back in this very step: the workers are to take it for one that does.
                self.prev_step_scheduled_req_ids.discard(request.request_id)
                self._rewound.add(request.request_id)
                self._rewound_at[request.request_id] = request.num_tokens
                return

    @property
    def _rewinds(self) -> bool:
        return capacity.packs_answers(self.vllm_config, self.compression)

    def _is_to_be_rewound(self, request: Request) -> bool:
        request_id = request.request_id
        chain = self._segments.chain_of(request_id)
        if not self._is_computed(request) or not self._is_long_enough(request, chain):
            return False
        config = self._config(request)
        again = self._rewound_at.get(request_id)
        if (
            request_id in self._pending
            or request_id in self._failed
            or request_id in self._shared
            or request_id in self._samples
            or self._why_exact(request) not in (None, Reason.SHORT)
            or (chain and not chain[-1].shared)
            or not self._may_be_rewound(request)
            or (again is not None and request.num_tokens < again + config.decode)
        ):
            return False
        # Of all its tokens, which are more than were known when it was admitted.
        behind = self.block_size, end_of(chain), packed_in(chain)
        span = spans.next_span(config, request.num_tokens, *behind, request.num_prompt_tokens)
        if span is None:
            return False
        blocks = self.block_lists.of(request_id)[span.first : span.end]
        if not span.pays(sum(block.ref_cnt <= 1 for block in blocks)):
            return False
        has_room = self._samples.has_room(span.tokens + config.window)
        if not has_room or not self._comes_back_at_once(request, span):
            return False
        steps = self._speed.steps(config, span.tokens)
        return self._alone or self._wish(request) is not None or steps < request.max_tokens - request.num_output_tokens

    def _comes_back_at_once(self, request: Request, span: spans.Span) -> bool:
        """Whether `admits` will let it in again: an answer that is being written is not to wait for others' ends."""
        others = [r for r in self.running if r is not request]
        to_come = [span, *(self._next_span(r) for r in others if r.request_id not in self._failed)]
        largest = max(one.packed_blocks for one in to_come if one is not None)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return not others or self._begun(others) + largest + len(others) + 1 <= free

    def _may_be_rewound(self, request: Request) -> bool:
        """Whether it would find its chain again, and be compressed then."""
        config = self._config(request)
        is_found = self._segments.root(request, config) is not None
        chain = self._segments.chain_of(request.request_id)
        return (
            is_found
            and all(are_there(segment.before) for segment in chain[-1:])
            and self.kv_cache_manager.prefix_cache_lookup_enabled(request)
            and request.num_tokens >= config.min_tokens
        )
