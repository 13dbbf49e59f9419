"""Scheduler side: swap a prompt's blocks for segments while it is computed, and what follows them as it grows."""

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
from kvsculpt_vllm.engine.scheduler.long_tails import LongTails
from kvsculpt_vllm.engine.scheduler.segments import Segment, end_of
from kvsculpt_vllm.engine.scheduler.story import Story
from kvsculpt_vllm.engine.shared import spans
from kvsculpt_vllm.engine.shared.commands import (
    AdoptCommand,
    CancelCommand,
    CommitCommand,
    ForgetCommand,
    Loaded,
    Pace,
    SampleCommand,
    SolveCommand,
    Solved,
    UnsampleCommand,
    attach,
    attached,
)
from kvsculpt_vllm.engine.shared.reasons import Outcome, Reason


class SculptSchedulerMixin(LongTails):
    """Takes fresh blocks for a segment and, once they are filled, gives the span's blocks back to vLLM's pool.

    Both phases run at the start of `schedule`. What has been *scheduled* of a prompt will be computed when the workers
    see this step's output, because they work first in, first out (also with async scheduling and pipeline
    parallelism).
    """

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        num_running, num_waiting = self.get_request_counts()
        # One engine of several (data parallel) keeps step with the others, whose requests it does not see.
        self._alone = num_running + num_waiting == 1 and self.vllm_config.parallel_config.data_parallel_size == 1
        self._prefixes.expire()
        self._note_windows()
        commands: list[CommitCommand | AdoptCommand | SolveCommand] = [
            *self._commit_solved(),
            *self._adopt_later(),
            *self._start_one(),
        ]
        self._rewind_long_tails()
        self._schedules = True
        output = super().schedule(*args, **kwargs)
        self._schedules = False
        meant = [*self._still_meant(commands, output), *self._cancel_what_does_not_pay(), *self._sample(output)]
        # What ended goes first: a load may be given its blocks.
        gone = [ForgetCommand(blocks)] if (blocks := self._segments.gone()) else []
        pace: list[Any] = [Pace(self._alone)] if self._pending or self._load else []
        if self._unsampled:
            pace.append(UnsampleCommand(self._unsampled))
            self._unsampled = []
        attach(output, [*meant, *gone, *self._take_new_loads(), *pace, *self._take_news(), self._pool_state()])
        return output

    def _note_windows(self) -> None:
        """Name the blocks of windows before places that running prompts' segments end at, while there are some."""
        if len(self._windows) and self.block_lists.pool.enable_caching:
            for request in self.running:
                self._windows.note(request, self._ends(request), self.block_size)

    def _ends(self, request: Request) -> Iterator[int]:
        """The blocks that a running request's segments to come end before, however many entries they keep."""
        span = self._next_span(request)
        while span is not None:
            yield span.end
            span = spans.next_span(
                self._config(request), self._num_known(request), self.block_size, span.end, span.packed_blocks
            )

    def _still_meant(
        self, commands: list[CommitCommand | AdoptCommand | SolveCommand], output: SchedulerOutput
    ) -> Iterator[CommitCommand | AdoptCommand | SolveCommand]:
        """Without what is for requests preempted in this very step: they have lost their blocks again, or have come
        back with others.
        """
        running = {request.request_id for request in self.running} if commands else set()
        running -= set(output.preempted_req_ids or ())
        for command in commands:
            if isinstance(command, CommitCommand | AdoptCommand):
                rows = {request_id: row for request_id, row in command.rows.items() if request_id in running}
                yield replace(command, rows=rows)
            elif command.request_id in running:
                yield command

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        for answer in attached(model_runner_output):
            if isinstance(answer, Loaded):
                self._hear_loaded(answer)
            else:
                self._hear(answer)
        self._end_hopeless()
        return super().update_from_output(scheduler_output, model_runner_output)

    def _sample(self, output: SchedulerOutput) -> Iterator[SampleCommand]:
        """What this step computes of prompts whose next segment is to be made: its queries are kept."""
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            known = self._num_known(request)
            first = request.num_computed_tokens - num_tokens
            if first >= known or request_id in self._failed:
                continue
            if request_id not in self._samples:
                span = self._next_span(request)
                if span is None or request_id in self._refused or first != span.first_token:
                    continue
                self._samples.begin(request_id, first, self._needed_for(request, span) - first)
            end = min(request.num_computed_tokens, known)
            self._samples.extend(request_id, end)
            yield SampleCommand(request_id, first, end)

    def _start_one(self) -> list[SolveCommand]:
        """The command for the first running request that can be compressed now, if there is one.

        One at a time: the others decode in between, and a worker's memory is reckoned for one.
        """
        commands: list[SolveCommand] = []
        self._waiting = 0
        busy = any(not pending.solved for pending in self._pending.values())
        for request in self.running:
            request_id = request.request_id
            if request_id in self._pending or request_id in self._failed:
                continue
            if (span := self._next_span(request)) is None:
                continue
            if not self._is_ready(request, span):
                if not self._is_computed(request):
                    continue
                if request_id in self._shared:  # its queries were not computed: it can adopt one, and not make it
                    self._waiting += 1
                    self._defer(request, Reason.SHARED_BLOCKS, "others hold its blocks, and may be sculpted for all")
                elif request_id in self._refused and self._rewinds:
                    self._waiting += 1  # it is computed again when there is room for its queries
                elif request_id in self._refused:
                    self._fail(request, Reason.NO_ROOM_FOR_QUERIES)
            elif busy or commands or (command := self._start(request, span)) is None:
                self._waiting += 1
            else:
                commands.append(command)
        return commands

    def _is_ready(self, request: Request, span: spans.Span) -> bool:
        """Whether all that a segment is made from has been given to the workers."""
        if not self._samples.cover(request.request_id, span.first_token, self._needed_for(request, span)):
            return False
        return self._may_be_packed(request)

    def _start(self, request: Request, span: spans.Span) -> SolveCommand | None:
        """Take blocks for the segment; None if it has to wait: for free blocks, or for others to finish.

        Blocks that other requests share are not freed by this one letting go of them. While no more would come free
        than the segment takes, compression would save nothing.
        """
        config, chain = self._config(request), self._segments.chain_of(request.request_id)
        pool, blocks = self.kv_cache_manager.block_pool, self.block_lists.of(request.request_id)
        key = self._key(request, span, chain)
        if key is not None and any(pending.key == key for pending in self._pending.values()):
            return None  # it will adopt that one
        free = pool.get_num_free_blocks()
        if free < span.packed_blocks:
            self._defer(request, Reason.NO_FREE_BLOCKS, f"{span.packed_blocks} free blocks needed, {free} there")
            if len(self.running) == 1 and self._cannot_be_exact(request):
                self.end_with_error(request)  # nobody will free any
            elif not (self._pending or self._load) and all(
                self._wish(other) and self._is_computed(other) for other in self.running
            ):
                self._fail(request, Reason.NO_ROOM)  # prefixes that wait for each other
            return None
        steps = self._speed.steps(config, span.tokens)
        ends = self._is_computed(request) and steps >= request.max_tokens - request.num_output_tokens
        if ends and not self._alone and not self._wish(request):
            if self._defer(request, Reason.ENDS_TOO_SOON, f"its answer would end before the {steps} steps it takes"):
                self._speed.doubt(config)
            return None
        # The dearest question last: it is asked of every waiting request at every step.
        if not self._pays(request, span):
            self._defer(request, Reason.SHARED_BLOCKS, "it would free no more blocks than it takes, others share them")
            return None
        packed = pool.get_new_blocks(span.packed_blocks)
        before = self._windows.before(request.request_id, span.end)
        pending = Pending(next(self._attempts), config, span, key, packed, before)
        self._pending[request.request_id] = pending
        end = -(-self._needed_for(request, span) // self.block_size)
        return SolveCommand(
            request_id=request.request_id,
            attempt=pending.attempt,
            num_prompt_tokens=request.num_prompt_tokens,
            first_token=span.first_token,
            span_tokens=span.tokens,
            window=config.window,
            exact=[block.block_id for block in blocks[span.first : end]],
            earlier=[[block.block_id for block in segment.packed] for segment in chain],
            packed=[block.block_id for block in pending.packed],
            blocks_held=sum(not block.is_null for block in blocks),
            followed=span.followed,
        )

    def _key(self, request: Request, span: spans.Span, chain: list[Segment]) -> bytes | None:
        """The name of the segment that is to be made; None if nobody else may find it."""
        root = self._segments.root(request, self._config(request))
        if root is None or not all(segment.shared for segment in chain[-1:]):
            return None
        return self._segments.key(chain[-1].key if chain else root, request, span.first_token, span.end_token)

    def _hear(self, solved: Solved) -> None:
        pending = self._pending.get(solved.request_id)
        if pending is None or pending.attempt != solved.attempt:
            return  # the request has lost its blocks since
        if solved.succeeded:
            pending.solved = solved
            self._speed.heard(pending.config, pending.span.tokens, solved.seconds)
            return
        request = self.requests[solved.request_id]
        self._drop(solved.request_id)
        too_much = solved.reason == Reason.ERROR_BOUND
        if too_much and (larger := pending.span.grown(solved.error, pending.config.max_error)) is not None:
            self._times_made[solved.request_id] += 1
            self._spans[solved.request_id] = larger
        else:
            self._fail(request, solved.reason or Reason.EXCEPTION, told=solved.told)

    def _fail(self, request: Request, reason: Reason, told: bool = False) -> None:
        """Nothing more of a request is compressed; `told` says that the workers' books know."""
        request_id = request.request_id
        self._failed.add(request_id)
        self._samples.release(request_id)
        self._unsampled.append(request_id)
        if not told and request_id not in self._told:
            self._skip(request, reason)
        self._told.add(request_id)
        if not self._segments.chain_of(request_id):
            self._stories[request_id] = Story(reason.outcome, reason)
        elif request_id in self._stories:
            self._stories[request_id] = replace(self._stories[request_id], reason=reason)

    def _end_hopeless(self) -> None:
        """End requests with an error that can go on neither compressed, because that failed, nor exact, because there
        is not so much memory.
        """
        for request_id in self._failed:
            request = self.requests[request_id]
            if self._cannot_be_exact(request) and not self._is_computed(request):
                self.end_with_error(request)

    def _commit_solved(self) -> Iterator[CommitCommand]:
        for request_id, pending in list(self._pending.items()):
            if pending.solved:
                del self._pending[request_id]
                yield self._commit(self.requests[request_id], pending, pending.solved)

    def _cancel_what_does_not_pay(self) -> Iterator[CancelCommand]:
        """Give up compressions whose request has come to share its blocks: it would hold no fewer for them. They begin
        anew when the others have finished.
        """
        for request_id, pending in list(self._pending.items()):
            if not self._pays(self.requests[request_id], pending.span):
                self._drop(request_id)
                self._defer(self.requests[request_id], Reason.SHARED_BLOCKS, "others have come to share its blocks")
                yield CancelCommand(request_id)

    def _commit(self, request: Request, pending: Pending, solved: Solved) -> CommitCommand:
        """What was solved is a segment now: the request's block list has it, and so have those that adopt it."""
        pool, span, request_id = self.kv_cache_manager.block_pool, pending.span, request.request_id
        chain = self._segments.chain_of(request_id)
        root = self._segments.root(request, pending.config)
        segment = Segment(
            key=pending.key or b"",
            parent=chain[-1].key if chain else root or b"",
            first=span.first,
            blocks=span.blocks,
            tokens=span.tokens,
            packed=pending.packed,
            effort=pending.config.effort,
            error=solved.error,
            shared=pending.key is not None and solved.by_method,
            before=pending.before,
        )
        self._segments.add(segment, request_id)
        free_before = pool.get_num_free_blocks()
        self._put(segment, request)
        adopted = self._adopt()
        outcome = Outcome.COMPRESSED if solved.by_method else Outcome.FALLBACK
        before = self._stories.get(request_id, Story(outcome))
        self._stories[request_id] = replace(
            before, outcome=outcome, reason=None, tokens_sculpted=before.tokens_sculpted + span.tokens
        )
        first_of_request = request_id not in self._told
        self._told.add(request_id)
        return CommitCommand(
            request_id=request_id,
            packed=[block.block_id for block in segment.packed],
            rows={reader.request_id: self._row(reader) for reader in (request, *adopted)},
            samples_from={reader.request_id: self._samples.first(reader.request_id) for reader in (request, *adopted)},
            # Counted with the blocks that the segment took.
            blocks_freed=pool.get_num_free_blocks() - free_before - span.packed_blocks,
            steps_waited=self._steps_waited.pop(request_id, 0),
            times_made=1 + self._times_made.pop(request_id, 0),
            first_of_request=first_of_request,
            store_as=self._name_to_store(request, segment),
        )

    def _adopt_later(self) -> Iterator[AdoptCommand]:
        """For those that were being computed when the segment was made."""
        if adopted := self._adopt():
            yield AdoptCommand(
                {request.request_id: self._row(request) for request in adopted},
                {request.request_id: self._samples.first(request.request_id) for request in adopted},
            )

    def _adopt(self) -> list[Request]:
        """Let requests have the segments that were made since they were looked up, of tokens that they computed."""
        return [request for request in self.running if self._adopts(request)]

    def _adopts(self, request: Request) -> bool:
        request_id = request.request_id
        if request_id in self._pending or self._looked_at.get(request_id) == self._segments.version:
            return False
        if self._is_computed(request):  # else it comes to know more of its tokens without any new segment
            self._looked_at[request_id] = self._segments.version
        if self._why_exact(request) is not None or not self._may_be_packed(request):
            return False
        config, adopted, most = self._config(request), False, self._most_packed(request)
        parent = self._segments.root(request, config)
        chain = self._segments.chain_of(request_id)
        if chain:
            parent = chain[-1].key if chain[-1].shared else None
        first = end_of(chain) * self.block_size
        while parent is not None:
            segment = self._segments.after(parent, request, config, first, most)
            if segment is None:
                break
            segment.renew(self._windows.before(request_id, segment.end))
            self.kv_cache_manager.block_pool.touch(segment.packed)
            self._hold(request, [segment], Reason.ADOPTED)
            self._put(segment, request)
            parent, first, adopted = segment.key, first + segment.tokens, True
        return adopted

    def _may_be_packed(self, request: Request) -> bool:
        return self._is_made_meanwhile(request) or self._is_computed(request)

    def _most_packed(self, request: Request) -> int:
        """Tokens of a request that segments may stand for now."""
        return min(request.num_computed_tokens, self._num_known(request) - self._config(request).window)

    def _row(self, request: Request) -> list[int]:
        return [block.block_id for block in self.block_lists.of(request.request_id)]

    def _put(self, segment: Segment, request: Request) -> None:
        """Put a segment into a block list, and free what stood in its place."""
        pool, request_id = self.kv_cache_manager.block_pool, request.request_id
        old = self.block_lists.replace(request_id, segment.first, segment.row(pool.null_block))
        # Freeing at once is safe: the workers change the request's row before the forward pass of this same step,
        # which is the first that could write to them. Reversed, as vLLM does: a prefix's end is evicted first.
        pool.free_blocks(reversed(old))
        self._spans.pop(request_id, None)
        span = self._next_span(request)
        if segment.shared:
            self._rename(request)
            self.block_lists.rename_tail(request, segment.end, segment.name, self._windows.noted(request_id))
        if request_id not in self._samples:
            return
        if span is None:
            self._samples.release(request_id)
        else:
            self._samples.drop(request_id, span.first_token, self._needed_for(request, span) - span.first_token)

    def _adopters(self, request: Request, span: spans.Span) -> list[Request]:
        """The other running requests that a segment of this one's may serve as well."""
        root = self._segments.root(request, self._config(request))
        if root is None or len(request.block_hashes) < span.end:
            return []
        name = request.block_hashes[span.end - 1]
        return [other for other in self.running if other is not request and self._may_adopt(other, root, name, span)]

    def _may_adopt(self, request: Request, root: bytes, name: BlockHash, span: spans.Span) -> bool:
        """Whether a request has the same chain, has computed the tokens that `name` tells, and may have a segment in
        their place.
        """
        request_id, chain = request.request_id, self._segments.chain_of(request.request_id)
        if (
            request_id in self._pending
            or self._why_exact(request) is not None
            or not self._may_be_packed(request)
            or end_of(chain) != span.first
            or len(request.block_hashes) < span.end
            or request.block_hashes[span.end - 1] != name
        ):
            return False
        root_of_its = self._segments.root(request, self._config(request))
        return span.end_token <= self._most_packed(request) and root_of_its == root

    def _pays(self, request: Request, span: spans.Span) -> bool:
        """Whether a compression frees more blocks than it takes, if those that adopt the segment let go of theirs, too.
        A copy frees none, and is made for what follows it; a prefix is made for those to come.
        """
        if span.packed_blocks == span.blocks or self._wish(request):
            return True
        holders = 1 + len(self._adopters(request, span))
        own = self.block_lists.of(request.request_id)[span.first : span.end]
        return span.pays(sum(block.ref_cnt <= holders for block in own))

    def kept_prefixes(self) -> dict[str, Any]:
        """The prefixes that were sculpted by name, for the front end."""
        return self._prefixes.told()

    def remove_prefix(self, prefix_id: str, and_its_segments: bool = True) -> bool:
        """Forget one of them, by its id or name, and free its blocks; returns whether there was one."""
        return self._prefixes.remove(prefix_id, and_its_segments)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """See vLLM's; pinned prefixes go, too: they are of the same weights as the rest of the cache."""
        pinned, done = self._prefixes.unpin_all(), False
        self._cancel_load()
        try:
            done = super().reset_prefix_cache(*args, **kwargs)
        finally:
            if not done:
                self._prefixes.pin_again(pinned)
        return done


class SculptScheduler(SculptSchedulerMixin, Scheduler):
    """The mixin over vLLM's synchronous scheduler."""


class SculptAsyncScheduler(SculptSchedulerMixin, AsyncScheduler):
    """The mixin over vLLM's asynchronous scheduler."""
