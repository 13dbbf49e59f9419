"""Worker side: bind compression to the attention layers and run the scheduler's commands before each forward pass.

On every device alike; `worker_cpu` and `worker_gpu` put it over vLLM's workers.
"""

from __future__ import annotations

import logging
import time
from copy import copy
from dataclasses import dataclass
from traceback import extract_tb
from typing import Any, ClassVar

from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.agreement import Failure, Ranks, agreed
from kvsculpt_vllm.engine.calibrated import of_rank
from kvsculpt_vllm.engine.command import CommitCommand, SolveCommand, Solved, attach, attached
from kvsculpt_vllm.engine.compat import BlockRows
from kvsculpt_vllm.engine.compressor import Compressor
from kvsculpt_vllm.engine.ledger import FAILED, FALLBACK, Ledger
from kvsculpt_vllm.engine.pages import PageFormat
from kvsculpt_vllm.engine.record import CompressionRecord, log, printable
from kvsculpt_vllm.engine.refusals import check_attention_layers
from kvsculpt_vllm.engine.rope import rotary_of_layers
from kvsculpt_vllm.engine.state import CompressionState
from kvsculpt_vllm.sculpt.slices import Slices

logger = init_logger("vllm.kvsculpt")


class AnsweringOutput(AsyncModelRunnerOutput):
    """An output that is still being computed, with messages to the scheduler."""

    def __init__(self, output: AsyncModelRunnerOutput, answers: list[Solved]) -> None:
        self._output, self._answers = output, answers

    def get_output(self) -> ModelRunnerOutput:
        """The finished output."""
        return _answering(self._output.get_output(), self._answers)


@dataclass
class Solving:
    """A compression in hand."""

    command: SolveCommand
    slices: Slices[CompressionRecord]
    first_failure: Failure | None  # of the method that was asked for, if this is the selection that takes its place
    outcome: CompressionRecord | Failure | None = None  # of this rank, once it is through
    raised: Exception | None = None  # what made it a failure


def _raised_at(error: Exception) -> tuple[str, int | None]:
    """File and line that an exception came from."""
    frame = extract_tb(error.__traceback__)[-1]
    return frame.filename, frame.lineno


def _answering(output: ModelRunnerOutput, answers: list[Solved]) -> ModelRunnerOutput:
    output = copy(output)  # vLLM shares one empty output among steps
    attach(output, answers)
    return output


class SculptWorkerMixin:
    """Compression over one of vLLM's workers, whose class says by which attention backend the cache is read."""

    attention_backend: ClassVar[tuple[AttentionBackendEnum, str]]  # the name that vLLM looks up, and our class
    page_format: ClassVar[PageFormat]  # what that backend's pages hold

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Here and not at import, so that a backend is replaced only where compression is on.
        register_backend(*self.attention_backend)
        super().__init__(*args, **kwargs)
        self.compression_state: CompressionState | None = None
        self.compressor: Compressor | None = None
        self.ledger: Ledger | None = None
        self.block_rows: BlockRows | None = None
        self.ranks: Ranks | None = None
        self.block_bytes = 0  # on all ranks
        self._solving: Solving | None = None
        self._answers: list[Solved] = []
        self._failed_at: set[tuple[str, int | None] | None] = set()

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Bind the layers once the KV cache exists."""
        super().initialize_from_config(kv_cache_config)
        (group,) = kv_cache_config.kv_cache_groups
        by_name = get_layers_from_vllm_config(self.vllm_config, Attention, group.layer_names)
        layers = [by_name[name] for name in group.layer_names]
        check_attention_layers(by_name)
        self.compression_state = CompressionState(
            CompressionConfig.from_additional_config(self.vllm_config.additional_config),
            self.model_runner,
            self.page_format,
            [layer.kv_cache for layer in layers],
            layers[0].num_heads,
            self.scheduler_config.max_num_seqs,
        )
        self.ranks = Ranks()
        self.block_bytes = sum(map(sum, self.ranks.gather(self.compression_state.block_bytes)))
        self.ledger = Ledger(self.block_bytes)
        self.block_rows = BlockRows(self.model_runner)
        for index, layer in enumerate(layers):
            layer.impl.state, layer.impl.layer_index = self.compression_state, index
        rotaries = rotary_of_layers(self.model_runner.get_model(), layers, self.model_config.hf_text_config)
        calibration = of_rank(
            self.compression_state.config,
            group.layer_names,
            layers[0].num_kv_heads,
            self.ranks.place[1],
            self.parallel_config.tensor_parallel_size,
        )
        self.compressor = Compressor(self.compression_state, rotaries, layers[0].impl.scale, calibration)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Do what the scheduler asks for, then run the step."""
        if self.compression_state is not None:
            self.compression_state.begin_step(scheduler_output)
            self._forget([*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())])
            for command in attached(scheduler_output):
                if isinstance(command, SolveCommand):
                    # The scheduler gives no second one before it has heard of the first, or its request is gone.
                    self._begin(command)
                elif isinstance(command, CommitCommand):
                    self._commit(command)
                else:
                    self.ledger.hear(command)
            self._go_on_solving()
        output = super().execute_model(scheduler_output)
        if self.compression_state is not None:
            self.compression_state.end_step()
        return self._with_answers(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """The step's second half, where the model runner has one."""
        return self._with_answers(super().sample_tokens(*args, **kwargs))

    def kv_compression_report(self, newest: int) -> dict[str, Any]:
        """Totals since start, the pool as it is now, and what became of the last so many requests, the newest first.

        JSON-serialisable; for `collective_rpc`.
        """
        return {"stats": self.ledger.stats(), "newest": self.ledger.newest(newest)}

    def kv_compression_request(self, request_id: str) -> dict[str, Any] | None:
        """What became of one request, None if it is not known (any more); for `collective_rpc`."""
        return self.ledger.find(request_id)

    def _commit(self, command: CommitCommand) -> None:
        record = self.compressor.commit(command, self.block_bytes)
        self.block_rows.replace(command.request_id, command.row)
        self.ledger.compressed(record)
        if self.ranks.is_first:
            log(record)

    def _forget(self, request_ids: list[str]) -> None:
        """Put an end to the compression of a request that lost its blocks: those to be written to are others' now."""
        if self._solving is not None and self._solving.command.request_id in request_ids:
            self._solving = None

    def _begin(self, command: SolveCommand, first_failure: Failure | None = None) -> None:
        fallback = first_failure.cause if first_failure else None
        self._solving = Solving(command, self.compressor.solve(command, fallback), first_failure)

    def _go_on_solving(self) -> None:
        """Work on the compression in hand until it is over, or has kept this step waiting for long enough.

        It is over once every rank is through with its part.
        """
        if self._solving is None:
            return
        if self._solving.outcome is None:
            self._work(self._solving)
        outcomes = self.ranks.gather(self._solving.outcome)
        if all(outcome is not None for stage in outcomes for outcome in stage):
            self._conclude(self._solving, outcomes)

    def _work(self, solving: Solving) -> None:
        deadline = time.perf_counter() + self.compression_state.config.max_stall_ms / 1000
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
            self.wait_for_device()
            if time.perf_counter() >= deadline:
                return

    def wait_for_device(self) -> None:
        """Until what a slice has launched is done: else the step would wait for it, however short the slice took."""

    def _conclude(self, solving: Solving, outcomes: list[list[CompressionRecord | Failure]]) -> None:
        """Have it used, or try selection if the method failed and the request wants that, or leave the cache exact.

        Whatever happens, the request's own blocks are as they were: it can go on with them, and so do all others.
        """
        state, command = self.compression_state, solving.command
        result, teller = agreed(outcomes, state.tracked(command.request_id).config.max_error)
        self._solving = None
        if isinstance(result, Failure):
            state.directory.release(command.request_id)
            final = solving.first_failure is not None or result.by_rule
            selects = not final and state.falls_back_to_selection(command.request_id)
            if teller == self.ranks.place:
                self._warn(solving, result, "tries selection" if selects else "stays exact")
            if selects:
                self._begin(command, first_failure=result)
                return
            lost = solving.first_failure or result
            outcome = FALLBACK if lost.by_rule else FAILED
            tokens = command.num_prompt_tokens
            self.ledger.settle(command.request_id, tokens, outcome, lost.cause, lost.description)
        else:
            state.solved[command.request_id] = result
        state.samples.pop(command.request_id, None)
        if self.ranks.is_heard:
            succeeded = not isinstance(result, Failure)
            self._answers.append(Solved(command.request_id, command.attempt, succeeded))

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

    def _with_answers(self, output: Any) -> Any:
        """The step's output with what there is to tell the scheduler; None (more to come) stays as it is."""
        if output is None or not self._answers:
            return output
        answers, self._answers = self._answers, []
        if isinstance(output, AsyncModelRunnerOutput):
            return AnsweringOutput(output, answers)
        return _answering(output, answers)
