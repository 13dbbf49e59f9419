"""What the scheduler knows of each request: what is to be compressed of it, and what became of that."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.compat.scheduler import SchedulerHooks
from kvsculpt_vllm.engine.scheduler.names import Names
from kvsculpt_vllm.engine.scheduler.prefixes import Prefixes
from kvsculpt_vllm.engine.scheduler.samples import Samples
from kvsculpt_vllm.engine.scheduler.segments import Segment, Segments, end_of, packed_in
from kvsculpt_vllm.engine.scheduler.speed import Speed
from kvsculpt_vllm.engine.scheduler.stock_blocks import StockBlocks
from kvsculpt_vllm.engine.scheduler.story import Story
from kvsculpt_vllm.engine.scheduler.windows import Before, Windows
from kvsculpt_vllm.engine.shared import capacity, sample_room, spans
from kvsculpt_vllm.engine.shared.commands import Deferred, PoolState, SegmentCounts, Settled, Solved
from kvsculpt_vllm.engine.shared.prefix_wish import Wish, wish_of
from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.engine.shared.record import printable
from kvsculpt_vllm.engine.startup.refusals.groups import check_kv_cache_config

logger = init_logger("vllm.kvsculpt")


@dataclass
class Pending:
    """A compression between its two phases."""

    attempt: int
    config: CompressionConfig
    span: spans.Span
    key: bytes | None  # of the segment that it is to become
    packed: list[KVCacheBlock]  # taken from the pool, in no block list yet
    before: Before | None = field(default_factory=list)  # see `Segment`
    solved: Solved | None = None


class KnownRequests(SchedulerHooks):
    """The scheduler's memory of requests, and what it tells the books of the workers.

    Nothing is remembered of a request that has gone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_kv_cache_config(self.kv_cache_config)
        # The null block serves nobody.
        self.compression = capacity.server_settings(self.vllm_config, self.kv_cache_config.num_blocks - 1)
        self._configs: dict[str, CompressionConfig] = {}
        self._whys: dict[str, Reason | None] = {}  # nothing of it is compressed
        self._known: dict[str, int] = {}  # tokens of a request that were known when it got its first blocks
        self._spans: dict[str, spans.Span | None] = {}  # the next segment of a running request
        self._looked_at: dict[str, int] = {}  # how many segments there had been when a request was last looked up
        self._pending: dict[str, Pending] = {}
        self._attempts = count()
        self._times_made: Counter[str] = Counter()  # solves of a request's next segment that lost too much
        self._stories: dict[str, Story] = {}
        self._told: set[str] = set()  # the books have heard what became of it
        self._failed: set[str] = set()  # nothing more of it will be compressed
        self._steps_waited: Counter[str] = Counter()
        self._shared: set[str] = set()  # found in the prefix cache as a whole, and not worth a compression
        self._shortened: dict[str, set[int]] = {}  # blocks of a hit that a prompt computes anew
        self._rewound: set[str] = set()  # gave up the blocks behind its chain, so that their queries are seen
        self._rewound_at: dict[str, int] = {}  # tokens that were known then
        self._refused: set[str] = set()  # there was no room for its queries
        self._unsampled: list[str] = []  # requests whose queries the workers need not keep any more
        self._schedules = False  # vLLM's scheduler is at work
        names = self._names = Names(self.vllm_config, self.compression)
        self._segments = Segments(
            self.kv_cache_manager.block_pool,
            names.model,
            names.calibration,
            self.block_size,
            spans.MOST_SEGMENTS,
            names.adapter,
        )
        pool = self.kv_cache_manager.block_pool
        pins = self.compression.pin_blocks
        most = pool.num_gpu_blocks - 1
        self._prefixes = Prefixes(self._segments, pool, most // 4 if pins == "auto" else min(pins, most))
        self._samples = Samples(sample_room.positions(self.vllm_config, self.compression))
        self._windows = Windows(self.block_lists)
        self._found: dict[str, list[Segment]] = {}  # by waiting requests
        self._renamed: set[str] = set()  # requests whose blocks are named after the chain that they begin with
        self._stock_blocks = StockBlocks(self.block_size)
        self._speed = Speed()
        self._alone = False  # one request is all there is
        self._waiting = 0  # requests that could be compressed but for room or their turn
        self._news: list[Settled | Deferred | SegmentCounts] = []  # for the books of the workers
        self._counts = self._counts_told = SegmentCounts()

    def add_request(self, request: Request) -> None:
        """See vLLM's; an answer ends where the memory does, as it ends at --max-model-len."""
        super().add_request(request)
        if request.sampling_params is None or request.resumable:
            return
        most = self._most_tokens_of(request)
        if request.num_prompt_tokens >= most:  # the front end did not know how much memory there is
            self.end_with_error(request)
        request.max_tokens = max(1, min(request.max_tokens, most - request.num_prompt_tokens))

    def _most_tokens_of(self, request: Request) -> int:
        """Tokens that a request may come to, prompt and answer."""
        config, tokens = self._config(request), request.prompt_token_ids
        exact = request.sampling_params is not None and request.sampling_params.prompt_logprobs is not None
        if exact or request.prompt_embeds is not None or tokens is None or spans.is_repetition(tokens):
            config = CompressionConfig()
        is_found_again = self._segments.root(request, config) is not None
        blocks = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        return capacity.most_tokens(self.vllm_config, config, blocks, is_found_again)

    def tell(self, request: Request) -> dict[str, Any] | None:
        """What became of a prompt whose request has ended; None for one that was never begun."""
        story = self._stories.pop(request.request_id, None)
        return None if story is None else story.told(request.num_prompt_tokens)

    def forget(self, request: Request) -> None:
        """The request lost its blocks (finished, aborted or preempted)."""
        request_id = request.request_id
        if request_id in self._pending:
            self._drop(request_id)
        if request.is_finished():
            self._end_story(request)
        elif self._schedules and not self.running and not self._prefixes.give_way():
            # No other one runs that it could have lost its blocks to: it does not fit, though it was reckoned to (its
            # segments had to keep more than they should), and would begin for ever.
            self.end_with_error(request)
        self._segments.release(request_id)
        self._samples.release(request_id)
        self._windows.forget(request_id)
        self._stock_blocks.forget(request)
        for kept in (self._found, self._known, self._spans, self._whys, self._shortened, self._steps_waited):
            kept.pop(request_id, None)
        self._told.discard(request_id)
        self._shared.discard(request_id)
        self._refused.discard(request_id)
        self._times_made.pop(request_id, None)
        if request.is_finished():
            for settings in (self._configs, self._looked_at, self._rewound_at):
                settings.pop(request_id, None)
            for requests in (self._renamed, self._failed, self._rewound):
                requests.discard(request_id)

    def _end_story(self, request: Request) -> None:
        request_id, chain = request.request_id, self._segments.chain_of(request.request_id)
        if request_id not in self._told:
            ended = Reason.SHARED_BLOCKS if request_id in self._shared else Reason.ENDED_FIRST
            if request_id in self._refused:
                ended = Reason.NO_ROOM_FOR_QUERIES
            self._skip(request, self._why_exact(request) or ended)
        if chain:
            self._stories[request_id] = replace(
                self._stories[request_id],
                pinned=self._keep_prefix(request, chain),
                segments=len(chain),
                entries_held=packed_in(chain) * self.block_size,
                held_out_error=max(segment.error for segment in chain),
            )

    def _keep_prefix(self, request: Request, chain: list[Segment]) -> bool:
        """List what a request made of a prefix; returns whether that is pinned."""
        if (wish := self._wish(request)) is None or request.status != RequestStatus.FINISHED_LENGTH_CAPPED:
            return False
        return self._prefixes.keep(wish, request.num_prompt_tokens, chain)

    @staticmethod
    def _wish(request: Request) -> Wish | None:
        """That its prompt is sculpted to the end, for others, and no answer is wanted."""
        return None if request.sampling_params is None else wish_of(request.sampling_params.extra_args)

    def _why_exact(self, request: Request) -> Reason | None:
        """Why nothing of a request is compressed, as far as is known of it now; None where something is."""
        request_id = request.request_id
        if request_id in self._known and request_id in self._whys:
            return self._whys[request_id]
        why = self._whys[request_id] = self._reason(request)
        return why

    def _reason(self, request: Request) -> Reason | None:
        params = request.sampling_params
        if params is None or request.resumable:
            return Reason.NO_SAMPLING
        config = self._config(request)
        why = spans.why_exact(config, self._num_known(request), self.block_size, params.max_tokens)
        if why == Reason.FEW_OUTPUT_TOKENS and (self._cannot_be_exact(request) or self._wish(request)):
            why = None
        # The tokens of embeddings are placeholders, or not there.
        tokens = request.all_token_ids if request.prompt_embeds is None else None
        if why is None and tokens is not None and spans.is_repetition(tokens):
            return Reason.REPETITION
        return why

    def _num_known(self, request: Request) -> int:
        """Tokens that are computed before the next one is sampled."""
        return self._known.get(request.request_id, request.num_tokens)

    def _cannot_be_exact(self, request: Request) -> bool:
        """Whether its known tokens are more than the whole pool holds, what is packed of them aside."""
        chain = self._segments.chain_of(request.request_id)
        blocks = -(-(self._num_known(request) + 1) // self.block_size)
        blocks += self._windows.most_blocks(blocks) - end_of(chain) + packed_in(chain)
        return blocks > self.kv_cache_manager.block_pool.num_gpu_blocks - 1

    def _next_span(self, request: Request) -> spans.Span | None:
        """The next segment to be made of a running request."""
        request_id = request.request_id
        if request_id not in self._spans:
            self._spans[request_id] = self._span_behind(request, self._segments.chain_of(request_id))
        return self._spans[request_id]

    def _span_behind(self, request: Request, chain: list[Segment]) -> spans.Span | None:
        if self._why_exact(request) is not None:
            return None
        return spans.next_span(
            self._config(request),
            self._num_known(request),
            self.block_size,
            end_of(chain),
            packed_in(chain),
            request.num_prompt_tokens,
        )

    def _needed_for(self, request: Request, span: spans.Span) -> int:
        """The position up to which a request has to be computed before the segment can be made."""
        return span.end_token + self._config(request).window

    def _config(self, request: Request) -> CompressionConfig:
        if request.request_id not in self._configs:
            params = request.sampling_params
            extra_args = None if params is None else params.extra_args
            self._configs[request.request_id] = self.compression.for_request(extra_args)
        return self._configs[request.request_id]

    def _skip(self, request: Request, reason: Reason) -> None:
        self._told.add(request.request_id)
        self._news.append(Settled(request.request_id, request.num_prompt_tokens, reason.outcome, reason))
        if request.request_id not in self._stories:
            self._stories[request.request_id] = Story(reason.outcome, reason)

    def _defer(self, request: Request, reason: Reason, cause: str) -> bool:
        """It goes on uncompressed and is looked at again in the next step. Returns whether that is the first time."""
        first_time = request.request_id not in self._steps_waited
        if first_time:
            logger.info("kvsculpt: request %s waits uncompressed: %s", printable(request.request_id), cause)
            self._news.append(Deferred(request.request_id, request.num_prompt_tokens, reason))
        self._steps_waited[request.request_id] += 1
        return first_time

    def _count(self, **more: int) -> None:
        """Add to the counts of segments."""
        self._counts = replace(self._counts, **{name: getattr(self._counts, name) + n for name, n in more.items()})

    def _take_news(self) -> list[Settled | Deferred | SegmentCounts]:
        """What the books of the workers have not heard yet."""
        news, self._news = self._news, []
        self._counts = replace(self._counts, evicted=self._segments.evicted)
        if self._counts != self._counts_told:
            self._counts_told = self._counts
            news.append(self._counts)
        return news

    def _pool_state(self) -> PoolState:
        pool = self.kv_cache_manager.block_pool
        total = pool.num_gpu_blocks - 1  # the null block serves nobody
        used = total - pool.get_num_free_blocks()
        stock = self._stock_blocks.count((r, len(self.block_lists.of(r.request_id))) for r in self.running)
        stock += self._windows.held(r.request_id for r in self.running)  # which stock vLLM holds, too
        return PoolState(
            total=total,
            used=used,
            saved=stock - used,
            compressed=sum(bool(self._segments.chain_of(r.request_id)) for r in self.running),
            segments=len(self._segments),
            pending=len(self._pending) + self._waiting,
        )

    def _is_computed(self, request: Request) -> bool:
        """Whether all that was known of a running request has been given to the workers."""
        return request.status == RequestStatus.RUNNING and request.num_computed_tokens >= self._num_known(request)

    def _drop(self, request_id: str) -> None:
        """Give back what was taken for a segment that will not be used."""
        self.kv_cache_manager.block_pool.free_blocks(reversed(self._pending.pop(request_id).packed))
