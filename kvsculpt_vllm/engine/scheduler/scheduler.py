"""Scheduler side: swap a prompt's blocks for a packed prefix once the prompt is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from kvsculpt_vllm.engine.scheduler.known_requests import Pending
from kvsculpt_vllm.engine.scheduler.prefix_hits import PrefixHits
from kvsculpt_vllm.engine.scheduler.segments import Segment, is_useful
from kvsculpt_vllm.engine.scheduler.story import Story
from kvsculpt_vllm.engine.shared import spans
from kvsculpt_vllm.engine.shared.commands import (
    AdoptCommand,
    CancelCommand,
    CommitCommand,
    ForgetCommand,
    Pace,
    SolveCommand,
    Solved,
    attach,
    attached,
)
from kvsculpt_vllm.engine.shared.reasons import Outcome, Reason


class SculptSchedulerMixin(PrefixHits):
    """Takes fresh blocks for a packed prefix and, once they are filled, gives the span's blocks back to vLLM's pool.

    Both phases run at the start of `schedule`. A request whose whole prompt has been *scheduled* will have it
    computed when the workers see this step's output, because they work first in, first out (also with async
    scheduling and pipeline parallelism).
    """

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
        return is_useful(tokens, request, config, span.tokens) and self._segments.root(request, config) == root

    def _blocks_to_free(self, request: Request, span: spans.Span) -> int:
        """How many blocks come free if this request, and those that adopt its packed prefix, let go of the span's."""
        holders = 1 + len(self._adopters(request, span))
        return sum(block.ref_cnt <= holders for block in self.block_lists.of(request.request_id)[: span.blocks])


class SculptScheduler(SculptSchedulerMixin, Scheduler):
    """The mixin over vLLM's synchronous scheduler."""


class SculptAsyncScheduler(SculptSchedulerMixin, AsyncScheduler):
    """The mixin over vLLM's asynchronous scheduler."""
