"""What a worker does for compression once its KV cache exists: run commands, solve in slices, answer the scheduler."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from traceback import extract_tb
from typing import Any, TypeGuard

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from kvsculpt_vllm.engine.compat.worker import BlockRows, OutputToCome
from kvsculpt_vllm.engine.shared.commands import (
    AdoptCommand,
    CancelCommand,
    CancelLoadCommand,
    CommitCommand,
    ForgetCommand,
    LoadCommand,
    Loaded,
    Pace,
    SampleCommand,
    SolveCommand,
    Solved,
    UnsampleCommand,
    attach,
    attached,
)
from kvsculpt_vllm.engine.shared.ledger import Ledger
from kvsculpt_vllm.engine.shared.reasons import Outcome, Reason
from kvsculpt_vllm.engine.shared.record import CompressionRecord, log, printable
from kvsculpt_vllm.engine.worker.agreement import Failure, Ranks, agreed
from kvsculpt_vllm.engine.worker.compressor import Compressor
from kvsculpt_vllm.engine.worker.state import CompressionState
from kvsculpt_vllm.engine.worker.stored import Loading, StoredSegments
from kvsculpt_vllm.sculpt.slices import Slices

logger = init_logger("vllm.kvsculpt")

ALONE_MS = 1000
"""For how long a compression goes on between two steps while nobody else runs or waits: who comes meanwhile, or goes,
is noticed after it.
"""


@dataclass
class Solving:
    """A compression in hand."""

    command: SolveCommand
    slices: Slices[CompressionRecord]
    first_failure: Failure | None  # of the method that was asked for, if this is the selection that takes its place
    slice_seconds: float = math.inf  # that a slice took lately; infinite as long as nobody knows
    outcome: CompressionRecord | Failure | None = None  # of this rank, once it is through
    raised: Exception | None = None  # what made it a failure


def _raised_at(error: Exception) -> tuple[str, int | None]:
    """File and line that an exception came from."""
    frame = extract_tb(error.__traceback__)[-1]
    return frame.filename, frame.lineno


def _all_through(
    outcomes: list[list[CompressionRecord | Failure | None]],
) -> TypeGuard[list[list[CompressionRecord | Failure]]]:
    return all(outcome is not None for stage in outcomes for outcome in stage)


def _answering(output: ModelRunnerOutput, answers: list[Solved | Loaded]) -> ModelRunnerOutput:
    output = copy(output)  # vLLM shares one empty output among steps
    attach(output, answers)
    return output


class Runtime:
    """Everything that a worker knows of compression. It is made when the KV cache is there, so that nothing in it is
    ever missing.
    """

    def __init__(
        self,
        state: CompressionState,
        compressor: Compressor,
        ranks: Ranks,
        block_rows: BlockRows,
        wait_for_device: Callable[[], None],
        stored: StoredSegments | None = None,
    ) -> None:
        self.state, self.compressor, self.ranks, self.block_rows = state, compressor, ranks, block_rows
        self.stored = stored
        self._wait_for_device = wait_for_device
        self.block_bytes = sum(map(sum, ranks.gather(state.block_bytes)))  # on all ranks
        self.ledger = Ledger(self.block_bytes, None if stored is None else stored.store)
        self._solving: Solving | None = None
        self._loading: Loading | None = None
        self._alone = False
        self._answers: list[Solved | Loaded] = []
        self._failed_at: set[tuple[str, int | None] | None] = set()

    def before_step(self, output: SchedulerOutput) -> None:
        """Do what the scheduler asks for, and go on with the compression in hand."""
        commands = attached(output)
        # First: a request that lost its blocks in this step may have solved what others read from now on.
        for command in commands:
            if isinstance(command, CommitCommand):
                self._commit(command)
            elif isinstance(command, AdoptCommand):
                self._replace_rows(command)
            elif isinstance(command, ForgetCommand):
                for block in command.first_blocks:
                    self.state.directory.forget(block)
        self.state.begin_step(output)
        self._forget([*output.finished_req_ids, *(output.preempted_req_ids or ())])
        for command in commands:
            if isinstance(command, SampleCommand):
                self.state.sample(command)
            elif isinstance(command, UnsampleCommand):
                for request_id in command.request_ids:
                    self.state.samples.pop(request_id, None)
            elif isinstance(command, SolveCommand):
                # The scheduler gives no second one before it has heard of the first, or its request is gone.
                self._begin(command)
            elif isinstance(command, CancelCommand):
                self._forget([command.request_id])
                self.state.unsolve(command.request_id)
            elif isinstance(command, LoadCommand):
                # One at a time: the scheduler gives no second one before it has heard of the first.
                self._loading = None if self.stored is None else self.stored.begin(command)
            elif isinstance(command, CancelLoadCommand):
                self._cancel_load(command)
            elif isinstance(command, Pace):
                self._alone = command.alone
            elif not isinstance(command, CommitCommand | AdoptCommand | ForgetCommand):
                self.ledger.hear(command)
        deadline = time.perf_counter() + self._stall_seconds()
        self._go_on_loading(deadline)
        self._go_on_solving(deadline)

    def _stall_seconds(self) -> float:
        stall_ms = self.state.config.max_stall_ms
        return (max(stall_ms, ALONE_MS) if self._alone else stall_ms) / 1000

    def after_step(self) -> None:
        """What is computed until the next step begins serves no request."""
        self.state.end_step()

    def with_answers(self, output: Any) -> Any:
        """The step's output with what there is to tell the scheduler; None (more to come) stays as it is."""
        if output is None or not self._answers:
            return output
        answers, self._answers = self._answers, []
        if isinstance(output, AsyncModelRunnerOutput):
            return OutputToCome(output, lambda finished: _answering(finished, answers))
        return _answering(output, answers)

    def _commit(self, command: CommitCommand) -> None:
        record = self.compressor.commit(command, self.block_bytes)
        self._replace_rows(command)
        self.ledger.compressed(record, command.first_of_request)
        if command.store_as is not None and self.stored is not None:
            self.stored.save(command.store_as, command.packed)
        if self.ranks.is_first:
            log(record)

    def _replace_rows(self, command: CommitCommand | AdoptCommand) -> None:
        for request_id, row in command.rows.items():
            self.block_rows.replace(request_id, row)
        for request_id, position in command.samples_from.items():
            self.state.packed_until(request_id, position)

    def _forget(self, request_ids: list[str]) -> None:
        """Put an end to the compression of a request that lost its blocks: those to be written to are others' now."""
        if self._solving is not None and self._solving.command.request_id in request_ids:
            self._solving = None

    def _begin(self, command: SolveCommand, first_failure: Failure | None = None) -> None:
        fallback = first_failure.reason if first_failure else None
        self._solving = Solving(command, self.compressor.solve(command, fallback), first_failure)

    def _go_on_loading(self, deadline: float) -> None:
        """Write what has been read from the store into its blocks. It is published once every rank is through."""
        if self._loading is None or self.stored is None:
            return
        if self._loading.outcome is None:
            self.stored.go_on(self._loading, deadline, self._alone)
        outcomes = [outcome for stage in self.ranks.gather(self._loading.outcome) for outcome in stage]
        through = [outcome for outcome in outcomes if outcome is not None]
        if len(through) < len(outcomes):
            return
        loading, self._loading, usable = self._loading, None, min(outcome.usable for outcome in through)
        self.stored.conclude(loading, usable)
        if self.ranks.is_heard:
            broken = any(outcome.broken and outcome.usable == usable for outcome in through)
            self._answers.append(Loaded(loading.command.number, usable, broken))

    def _cancel_load(self, command: CancelLoadCommand) -> None:
        if self.stored is not None and self._loading is not None and self._loading.command.number == command.number:
            self.stored.conclude(self._loading, 0)
            self._loading = None
        for block in command.first_blocks:  # it may have been published, and the scheduler has not heard of that
            self.state.directory.forget(block)

    def _go_on_solving(self, deadline: float) -> None:
        """Work on the compression in hand until it is over, or has kept this step waiting for long enough.

        It is over once every rank is through with its part.
        """
        if self._solving is None:
            return
        if self._solving.outcome is None:
            self._work(self._solving, deadline)
        outcomes = self.ranks.gather(self._solving.outcome)
        if _all_through(outcomes):
            self._conclude(self._solving, outcomes)

    def _work(self, solving: Solving, deadline: float) -> None:
        waited_at, since = time.perf_counter(), 0
        while True:
            try:
                next(solving.slices)
            except StopIteration as done:
                solving.outcome = done.value
                return
            except Exception as error:  # noqa: BLE001 - told, counted, and no reason to end the other requests
                # No memory, a matrix that cannot be factored, a bug.
                solving.outcome, solving.raised = Failure.of(error), error
                return
            since += 1
            # A device is behind the host, and idle while the host waits for it. So by what slices took lately, half of
            # the time that is left may be given away at once: if they take twice as long now, nothing is late.
            expected = since * solving.slice_seconds
            if time.perf_counter() < deadline and expected < (deadline - waited_at) / 2:
                continue
            self._wait_for_device()
            now = time.perf_counter()
            solving.slice_seconds = (now - waited_at) / since
            waited_at, since = now, 0
            if now >= deadline:
                return

    def _conclude(self, solving: Solving, outcomes: list[list[CompressionRecord | Failure]]) -> None:
        """Have it used, or try selection if the method failed and the request wants that, or leave the cache exact.

        Whatever happens, the request's own blocks are as they were: it can go on with them, and so do all others.
        """
        command = solving.command
        result, teller = agreed(outcomes, self.state.config_of(command.request_id).max_error)
        self._solving = None
        if isinstance(result, Failure):
            self.state.directory.release(command.request_id)
            final = solving.first_failure is not None or result.by_rule
            selects = not final and self.state.config_of(command.request_id).on_failure == "select"
            if teller == self.ranks.place:
                self._warn(solving, result, "tries selection" if selects else "stays exact")
            if selects:
                self._begin(command, first_failure=result)
                return
            lost = solving.first_failure or result
            # What loses too much may be made again, with more entries: the scheduler decides, and tells the books.
            told = lost.reason != Reason.ERROR_BOUND
            if told:
                outcome = Outcome.FALLBACK if lost.by_rule else Outcome.FAILED
                tokens = command.num_prompt_tokens
                self.ledger.settle(command.request_id, tokens, outcome, lost.reason, lost.description)
                self.state.samples.pop(command.request_id, None)
            answer = Solved(
                command.request_id,
                command.attempt,
                succeeded=False,
                error=lost.error,
                reason=lost.reason,
                told=told,
            )
        else:
            self.state.solved[command.request_id] = result
            answer = Solved(
                command.request_id,
                command.attempt,
                seconds=result.seconds,
                error=result.error_after,
                by_method=not result.fallback,
            )
        if self.ranks.is_heard:
            self._answers.append(answer)

    def _warn(self, solving: Solving, failure: Failure, consequence: str) -> None:
        quiet = failure.by_rule and solving.first_failure is None
        where = _raised_at(solving.raised) if solving.raised else None
        logger.log(
            logging.INFO if quiet else logging.WARNING,
            "kvsculpt: request %s %s, its compression cannot be used: %s",
            printable(solving.command.request_id),
            consequence,
            failure.description,
            # A traceback tells nothing about a loss, and the second one nothing new.
            exc_info=None if failure.by_rule or where in self._failed_at else solving.raised,
        )
        self._failed_at.add(where)
