"""What the scheduler knows of each request: what is to be compressed of it, and what became of that."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import count
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.compat.scheduler import SchedulerHooks
from kvsculpt_vllm.engine.scheduler.segments import Segment, Segments
from kvsculpt_vllm.engine.scheduler.speed import Speed
from kvsculpt_vllm.engine.scheduler.stock_blocks import StockBlocks
from kvsculpt_vllm.engine.scheduler.story import Story
from kvsculpt_vllm.engine.shared import spans
from kvsculpt_vllm.engine.shared.commands import Deferred, PoolState, Settled, Solved
from kvsculpt_vllm.engine.shared.reasons import Outcome, Reason
from kvsculpt_vllm.engine.shared.record import printable
from kvsculpt_vllm.engine.startup.refusals import check_kv_cache_config

logger = init_logger("vllm.kvsculpt")


@dataclass
class Pending:
    """A compression between its two phases."""

    attempt: int
    config: CompressionConfig
    span: spans.Span
    packed: list[KVCacheBlock]  # taken from the pool, in no block list yet
    solved: Solved | None = None


class KnownRequests(SchedulerHooks):
    """The scheduler's memory of requests, and what it tells the books of the workers.

    Nothing is remembered of a request that has gone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_kv_cache_config(self.kv_cache_config)
        self.compression = CompressionConfig.from_additional_config(self.vllm_config.additional_config)
        self._plans: dict[str, spans.Span | Reason] = {}
        self._configs: dict[str, CompressionConfig] = {}
        self._looked_at: dict[str, int] = {}  # how many segments there had been when a request was last looked up
        self._pending: dict[str, Pending] = {}
        self._attempts = count()
        self._stories: dict[str, Story] = {}
        self._settled: set[str] = set()  # being compressed, compressed, or to stay exact
        self._steps_waited: Counter[str] = Counter()
        self._shared: set[str] = set()  # found in the prefix cache as a whole, and not worth a compression
        self._shortened: dict[str, set[int]] = {}  # blocks of a hit that a prompt computes anew
        model = self.vllm_config.model_config
        self._segments = Segments(
            self.kv_cache_manager.block_pool,
            f"{model.model} {model.revision} {model.dtype}",
            self.compression.calibration,
            self.block_size,
            spans.MOST_SEGMENTS,
        )
        self._found: dict[str, Segment] = {}  # by waiting requests
        self._renamed: set[str] = set()  # requests whose blocks are named after the segment that they begin with
        self._compressed: set[str] = set()
        self._stock_blocks = StockBlocks(self.block_size)
        self._speed = Speed()
        self._alone = False  # one request is all there is
        self._waiting = 0  # requests that could be compressed but for room or their turn
        self._news: list[Settled | Deferred] = []  # for the books of the workers

    def tell(self, request: Request) -> dict[str, Any] | None:
        """What became of a prompt whose request has ended; None for one that was never begun."""
        story = self._stories.pop(request.request_id, None)
        return None if story is None else story.told(request.num_prompt_tokens)

    def forget(self, request: Request) -> None:
        """The request lost its blocks (finished, aborted or preempted)."""
        request_id = request.request_id
        if request_id in self._pending:
            self._drop(request_id)
            self._settled.discard(request_id)  # so that the books hear of it
        if request.is_finished() and request_id not in self._settled:
            span = self._span(request)
            ended = Reason.SHARED_BLOCKS if request_id in self._shared else Reason.ENDED_FIRST
            self._skip(request, span if isinstance(span, Reason) else ended)
        self._settled.discard(request_id)
        self._segments.release(request_id)
        self._found.pop(request_id, None)
        if request.is_finished():
            self._renamed.discard(request_id)
            self._plans.pop(request_id, None)
            self._configs.pop(request_id, None)
            self._looked_at.pop(request_id, None)
        self._compressed.discard(request_id)
        self._stock_blocks.forget(request)
        self._steps_waited.pop(request_id, None)
        self._shared.discard(request_id)
        self._shortened.pop(request_id, None)

    def _span(self, request: Request) -> spans.Span | Reason:
        """What is to be compressed of a request, or why nothing is."""
        if request.request_id not in self._plans:
            self._plans[request.request_id] = self._plan(request)
        return self._plans[request.request_id]

    def _plan(self, request: Request) -> spans.Span | Reason:
        params = request.sampling_params
        if params is None or request.resumable:
            return Reason.NO_SAMPLING
        config = self._config(request)
        planned = spans.plan_span(config, request.num_prompt_tokens, self.block_size, params.max_tokens)
        # The tokens of embeddings are placeholders, or not there.
        tokens = request.prompt_token_ids if request.prompt_embeds is None else None
        if isinstance(planned, spans.Span) and tokens is not None and spans.is_repetition(tokens):
            return Reason.REPETITION
        return planned

    def _config(self, request: Request) -> CompressionConfig:
        if request.request_id not in self._configs:
            params = request.sampling_params
            extra_args = None if params is None else params.extra_args
            self._configs[request.request_id] = self.compression.for_request(extra_args)
        return self._configs[request.request_id]

    def _skip(self, request: Request, reason: Reason) -> None:
        self._news.append(Settled(request.request_id, request.num_prompt_tokens, Outcome.SKIPPED, reason))
        self._stories[request.request_id] = Story(Outcome.SKIPPED, reason)

    def _defer(self, request: Request, reason: Reason, cause: str) -> bool:
        """It goes on uncompressed and is looked at again in the next step. Returns whether that is the first time."""
        first_time = request.request_id not in self._steps_waited
        if first_time:
            logger.info("kvsculpt: request %s waits uncompressed: %s", printable(request.request_id), cause)
            self._news.append(Deferred(request.request_id, request.num_prompt_tokens, reason))
        self._steps_waited[request.request_id] += 1
        return first_time

    def _pool_state(self) -> PoolState:
        pool = self.kv_cache_manager.block_pool
        total = pool.num_gpu_blocks - 1  # the null block serves nobody
        used = total - pool.get_num_free_blocks()
        stock = self._stock_blocks.count((r, len(self.block_lists.of(r.request_id))) for r in self.running)
        return PoolState(
            total=total,
            used=used,
            saved=stock - used,
            compressed=len(self._compressed),
            segments=len(self._segments),
            pending=len(self._pending) + self._waiting,
        )

    def _is_computed(self, request: Request) -> bool:
        """Whether all of a running request's prompt has been given to the workers."""
        return (
            request.status == RequestStatus.RUNNING
            and not request.is_prefill_chunk
            and request.num_computed_tokens >= request.num_prompt_tokens
        )

    def _drop(self, request_id: str) -> None:
        """Give back what was taken for a packed prefix that will not be used."""
        self.kv_cache_manager.block_pool.free_blocks(reversed(self._pending.pop(request_id).packed))
