"""Scheduler side: swap a prompt's blocks for a packed prefix once the prompt is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.compat.scheduler import GROUP, SchedulerHooks, name_by_tokens, name_from
from kvsculpt_vllm.engine.scheduler.segments import WORTH, Segment, Segments
from kvsculpt_vllm.engine.scheduler.speed import Speed
from kvsculpt_vllm.engine.scheduler.stock_blocks import StockBlocks
from kvsculpt_vllm.engine.scheduler.story import Story
from kvsculpt_vllm.engine.shared import spans
from kvsculpt_vllm.engine.shared.commands import (
    AdoptCommand,
    CancelCommand,
    CommitCommand,
    Deferred,
    ForgetCommand,
    Pace,
    PoolState,
    Settled,
    SolveCommand,
    Solved,
    attach,
    attached,
)
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


class SculptSchedulerMixin(SchedulerHooks):
    """Takes fresh blocks for a packed prefix and, once they are filled, gives the span's blocks back to vLLM's pool.

    Both phases run at the start of `schedule`. A request whose whole prompt has been *scheduled* will have it
    computed when the workers see this step's output, because they work first in, first out (also with async
    scheduling and pipeline parallelism).
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

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        num_running, num_waiting = self.get_request_counts()
        # One engine of several (data parallel) keeps step with the others, whose requests it does not see.
        self._alone = num_running + num_waiting == 1 and self.vllm_config.parallel_config.data_parallel_size == 1
        commands: list[CommitCommand | AdoptCommand | SolveCommand] = [
            *self._commit_solved(),
            *self._adopt_later(),
            *self._start_one(),
        ]
        output = super().schedule(*args, **kwargs)
        meant = [*self._still_meant(commands), *self._cancel_what_does_not_pay()]
        gone = [ForgetCommand(blocks)] if (blocks := self._segments.gone()) else []
        pace = [Pace(self._alone)] if self._pending else []
        news, self._news = self._news, []
        attach(output, [*meant, *gone, *pace, *news, self._pool_state()])
        return output

    def _still_meant(
        self, commands: list[CommitCommand | AdoptCommand | SolveCommand]
    ) -> Iterator[CommitCommand | AdoptCommand | SolveCommand]:
        """Without what is for requests preempted in this very step: they have lost their blocks again."""
        running = {request.request_id for request in self.running} if commands else set()
        for command in commands:
            if isinstance(command, CommitCommand | AdoptCommand):
                rows = {request_id: row for request_id, row in command.rows.items() if request_id in running}
                yield replace(command, rows=rows)
            elif command.request_id in running:
                yield command

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        for solved in attached(model_runner_output):
            self._hear(solved)
        return super().update_from_output(scheduler_output, model_runner_output)

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

    def tell(self, request: Request) -> dict[str, Any] | None:
        """What became of a prompt whose request has ended; None for one that was never begun."""
        story = self._stories.pop(request.request_id, None)
        return None if story is None else story.told(request.num_prompt_tokens)

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

    def _start_one(self) -> list[SolveCommand]:
        """The command for the first running request that can be compressed now, if there is one.

        One at a time: the others decode in between, and a worker's memory is reckoned for one.
        """
        commands: list[SolveCommand] = []
        self._waiting = 0
        busy = any(not pending.solved for pending in self._pending.values())
        for request in self.running:
            if request.request_id in self._settled or not self._is_computed(request):
                continue
            if isinstance(span := self._span(request), Reason):
                self._settled.add(request.request_id)
                self._skip(request, span)
            elif request.request_id in self._shared:  # its queries were not computed: it can adopt one, and not make it
                self._waiting += 1
                self._defer(request, Reason.SHARED_BLOCKS, "others hold its blocks, and may be sculpted for all")
            elif busy or commands or (command := self._start(request, span)) is None:
                self._waiting += 1
            else:
                self._settled.add(request.request_id)
                commands.append(command)
        return commands

    def _start(self, request: Request, span: spans.Span) -> SolveCommand | None:
        """Take blocks for the packed prefix; None if it has to wait: for free blocks, or for others to finish.

        Blocks that other requests share are not freed by this one letting go of them. While no more would come free
        than the packed prefix takes, compression would save nothing.
        """
        config = self._config(request)
        pool, blocks = self.kv_cache_manager.block_pool, self.block_lists.of(request.request_id)
        free = pool.get_num_free_blocks()
        if free < span.packed_blocks:
            self._defer(request, Reason.NO_FREE_BLOCKS, f"{span.packed_blocks} free blocks needed, {free} there")
            return None
        steps = self._speed.steps(config, span.tokens)
        if not self._alone and steps >= request.max_tokens - request.num_output_tokens:
            if self._defer(request, Reason.ENDS_TOO_SOON, f"its answer would end before the {steps} steps it takes"):
                self._speed.doubt(config)
            return None
        # The dearest question last: it is asked of every waiting request at every step.
        if not span.pays(self._blocks_to_free(request, span)):
            self._defer(request, Reason.SHARED_BLOCKS, "it would free no more blocks than it takes, others share them")
            return None
        pending = Pending(next(self._attempts), config, span, pool.get_new_blocks(span.packed_blocks))
        self._pending[request.request_id] = pending
        return SolveCommand(
            request_id=request.request_id,
            attempt=pending.attempt,
            num_prompt_tokens=request.num_prompt_tokens,
            span_tokens=span.tokens,
            prompt_blocks=[block.block_id for block in blocks[: -(-request.num_prompt_tokens // self.block_size)]],
            packed=[block.block_id for block in pending.packed],
        )

    def _defer(self, request: Request, reason: Reason, cause: str) -> bool:
        """It goes on uncompressed and is looked at again in the next step. Returns whether that is the first time."""
        first_time = request.request_id not in self._steps_waited
        if first_time:
            logger.info("kvsculpt: request %s waits uncompressed: %s", printable(request.request_id), cause)
            self._news.append(Deferred(request.request_id, request.num_prompt_tokens, reason))
        self._steps_waited[request.request_id] += 1
        return first_time

    def _hear(self, solved: Solved) -> None:
        pending = self._pending.get(solved.request_id)
        if pending is None or pending.attempt != solved.attempt:
            return  # the request has lost its blocks since
        if solved.succeeded:
            pending.solved = solved
            self._speed.heard(pending.config, pending.span.tokens, solved.seconds)
        else:
            self._drop(solved.request_id)
            reason = solved.reason or Reason.EXCEPTION
            self._stories[solved.request_id] = Story(reason.outcome, reason)

    def _drop(self, request_id: str) -> None:
        """Give back what was taken for a packed prefix that will not be used."""
        self.kv_cache_manager.block_pool.free_blocks(reversed(self._pending.pop(request_id).packed))

    def _commit_solved(self) -> Iterator[CommitCommand]:
        for request_id, pending in list(self._pending.items()):
            if pending.solved:
                yield self._commit(self.requests[request_id], pending, pending.solved)
                del self._pending[request_id]

    def _cancel_what_does_not_pay(self) -> Iterator[CancelCommand]:
        """Give up compressions whose request has come to share its blocks: it would hold no fewer for them. They begin
        anew when the others have finished.
        """
        for request_id, pending in list(self._pending.items()):
            if not pending.span.pays(self._blocks_to_free(self.requests[request_id], pending.span)):
                self._drop(request_id)
                self._settled.discard(request_id)
                self._defer(self.requests[request_id], Reason.SHARED_BLOCKS, "others have come to share its blocks")
                yield CancelCommand(request_id)

    def _commit(self, request: Request, pending: Pending, solved: Solved) -> CommitCommand:
        """What was solved is a segment now: the request's block list begins with it, and so do those that adopt it."""
        pool, span = self.kv_cache_manager.block_pool, pending.span
        root = self._segments.root(request, pending.config)
        segment = Segment(
            key=b"" if root is None else self._segments.key(request, root, span.tokens),
            root=root or b"",
            tokens=span.tokens,
            blocks=span.blocks,
            packed=pending.packed,
            effort=pending.config.effort,
            error=solved.error,
            shared=root is not None and solved.by_method,
        )
        self._segments.add(segment, request.request_id)
        free_before = pool.get_num_free_blocks()
        self._begin_with(segment, request)
        readers = [request, *self._adopt()]
        self._compressed.add(request.request_id)
        self._stories[request.request_id] = Story(
            Outcome.COMPRESSED if solved.by_method else Outcome.FALLBACK,
            tokens_sculpted=span.tokens,
            entries_held=span.packed_blocks * self.block_size,
            held_out_error=solved.error,
        )
        return CommitCommand(
            request_id=request.request_id,
            first_block=segment.packed[0].block_id,
            rows={reader.request_id: self._row(reader) for reader in readers},
            # Counted with the blocks that the packed prefix took.
            blocks_freed=pool.get_num_free_blocks() - free_before - span.packed_blocks,
            steps_waited=self._steps_waited.pop(request.request_id, 0),
        )

    def _adopt_later(self) -> Iterator[AdoptCommand]:
        """For those that were being computed when the segment was made."""
        if adopted := self._adopt():
            yield AdoptCommand({request.request_id: self._row(request) for request in adopted})

    def _adopt(self) -> list[Request]:
        """Let computed requests begin with a segment that was made since they were looked up."""
        adopted = []
        for request in self.running:
            if (
                request.request_id in self._settled
                or self._looked_at.get(request.request_id, 0) == self._segments.version
                or not self._is_computed(request)
            ):
                continue
            self._looked_at[request.request_id] = self._segments.version
            if segment := self._segment_for(request):
                self.kv_cache_manager.block_pool.touch(segment.packed)
                self._begin_with(segment, request)
                self._hold(request, segment, Reason.ADOPTED)
                adopted.append(request)
        return adopted

    def _is_computed(self, request: Request) -> bool:
        """Whether all of a running request's prompt has been given to the workers."""
        return (
            request.status == RequestStatus.RUNNING
            and not request.is_prefill_chunk
            and request.num_computed_tokens >= request.num_prompt_tokens
        )

    def _row(self, request: Request) -> list[int]:
        return [block.block_id for block in self.block_lists.of(request.request_id)]

    def _begin_with(self, segment: Segment, request: Request) -> None:
        """Rewrite a block list, and free what it began with."""
        pool = self.kv_cache_manager.block_pool
        old = self.block_lists.replace_first(request.request_id, segment.row(pool.null_block))
        # Freeing at once is safe: the workers change the request's row before the forward pass of this same step,
        # which is the first that could write to them. Reversed, as vLLM does: a prefix's end is evicted first.
        pool.free_blocks(reversed(old))
        if segment.shared:
            self._rename(request)
            self.block_lists.rename_tail(request, segment.blocks, segment.name)

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

    def _adopters(self, request: Request, span: spans.Span) -> list[Request]:
        """The other running requests that a packed prefix of this one's may serve as well."""
        root = self._segments.root(request, self._config(request))
        if root is None:
            return []
        name = request.block_hashes[span.blocks - 1]
        return [
            other for other in self.running if other is not request and self._may_adopt(other, root, name, span.tokens)
        ]

    def _may_adopt(self, request: Request, root: bytes, name: BlockHash, tokens: int) -> bool:
        """Whether a request's first `tokens` are those of `name`, computed, and may be replaced by such a segment."""
        last = tokens // self.block_size - 1
        if (
            request.request_id in self._settled
            or not self._is_computed(request)
            or len(request.block_hashes) <= last
            or request.block_hashes[last] != name
            or isinstance(span := self._span(request), Reason)
        ):
            return False
        config = self._config(request)
        return (
            WORTH * span.tokens <= tokens <= request.num_prompt_tokens - config.window
            and self._segments.root(request, config) == root
        )

    def _blocks_to_free(self, request: Request, span: spans.Span) -> int:
        """How many blocks come free if this request, and those that adopt its packed prefix, let go of the span's."""
        holders = 1 + len(self._adopters(request, span))
        return sum(block.ref_cnt <= holders for block in self.block_lists.of(request.request_id)[: span.blocks])


class SculptScheduler(SculptSchedulerMixin, Scheduler):
    """The mixin over vLLM's synchronous scheduler."""


class SculptAsyncScheduler(SculptSchedulerMixin, AsyncScheduler):
    """The mixin over vLLM's asynchronous scheduler."""
