"""Worker side: bind compression to the attention layers and run the scheduler's commands before each forward pass.

On every device alike; `worker_cpu` and `worker_gpu` put it over vLLM's workers.
"""

from __future__ import annotations

import logging
import time
from copy import copy
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
from kvsculpt_vllm.engine.command import CommitCommand, SolveCommand, Solved, attach, attached
from kvsculpt_vllm.engine.compat import BlockRows
from kvsculpt_vllm.engine.compressor import Cause, Compressor, cause_of
from kvsculpt_vllm.engine.ledger import FAILED, FALLBACK, Ledger
from kvsculpt_vllm.engine.pages import PageFormat
from kvsculpt_vllm.engine.record import log, printable
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


def _raised_at(error: Exception) -> tuple[str, int | None]:
    """File and line that an exception came from."""
    frame = extract_tb(error.__traceback__)[-1]
    return frame.filename, frame.lineno


def _described(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}")


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
        self._solving: tuple[SolveCommand, Slices[bool]] | None = None
        self._answers: list[Solved] = []
        self._failed_at: set[tuple[str, int | None]] = set()

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
        self.ledger = Ledger(self.compression_state.block_bytes)
        self.block_rows = BlockRows(self.model_runner)
        for index, layer in enumerate(layers):
            layer.impl.state, layer.impl.layer_index = self.compression_state, index
        rotaries = rotary_of_layers(self.model_runner.get_model(), layers, self.model_config.hf_text_config)
        self.compressor = Compressor(self.compression_state, rotaries, layers[0].impl.scale)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Do what the scheduler asks for, then run the step."""
        if self.compression_state is not None:
            self.compression_state.begin_step(scheduler_output)
            self._forget([*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())])
            for command in attached(scheduler_output):
                if isinstance(command, SolveCommand):
                    # The scheduler gives no second one before it has heard of the first, or its request is gone.
                    self._solving = command, self._solve(command)
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
        record = self.compressor.commit(command)
        self.block_rows.replace(command.request_id, command.row)
        self.ledger.compressed(record)
        if self.is_driver_worker:
            log(record)

    def _forget(self, request_ids: list[str]) -> None:
        """Put an end to the compression of a request that lost its blocks: those to be written to are others' now."""
        if self._solving is not None and self._solving[0].request_id in request_ids:
            self._solving = None

    def _go_on_solving(self) -> None:
        """Work on the compression in hand until it is over, or has kept this step waiting for long enough."""
        if self._solving is None:
            return
        command, slices = self._solving
        deadline = time.perf_counter() + self.compression_state.config.max_stall_ms / 1000
        while True:
            try:
                next(slices)
            except StopIteration as done:
                self._answers.append(Solved(command.request_id, command.attempt, succeeded=done.value))
                self._solving = None
                return
            self.wait_for_device()
            if time.perf_counter() >= deadline:
                return

    def wait_for_device(self) -> None:
        """Until what a slice has launched is done: else the step would wait for it, however short the slice took."""

    def _solve(self, command: SolveCommand) -> Slices[bool]:
        """Compress, by selection if the method fails and the request wants that; whether it can be used.

        Whatever happens, the request's own blocks are as they were: it can go on with them, and so do all others.
        """
        state = self.compression_state
        error = yield from self._attempt(command)
        succeeded = error is None
        if error is not None:
            cause = cause_of(error)
            lost = cause in (Cause.ERROR_BOUND, Cause.NO_ROOM_FOR_QUERIES)  # by a rule, not by a fault
            selects = not lost and state.falls_back_to_selection(command.request_id)
            self._warn(command, error, "tries selection" if selects else "stays exact", quiet=lost)
            if selects:
                again = yield from self._attempt(command, fallback=cause)
                succeeded = again is None
                if again is not None:
                    self._warn(command, again, "stays exact", quiet=False)
            if not succeeded:
                outcome = FALLBACK if lost else FAILED
                self.ledger.settle(command.request_id, command.num_prompt_tokens, outcome, cause, _described(error))
        state.samples.pop(command.request_id, None)
        return succeeded

    def _attempt(self, command: SolveCommand, fallback: Cause | None = None) -> Slices[Exception | None]:
        """What was raised: no memory, a matrix that cannot be factored, too large a loss, a bug."""
        try:
            yield from self.compressor.solve(command, fallback)
        except Exception as error:  # noqa: BLE001 - told, counted, and no reason to end the other requests
            return error
        return None

    def _warn(self, command: SolveCommand, error: Exception, consequence: str, quiet: bool) -> None:
        where = _raised_at(error)
        if self.is_driver_worker:
            logger.log(
                logging.INFO if quiet else logging.WARNING,
                "kvsculpt: request %s %s, its compression cannot be used: %s",
                printable(command.request_id),
                consequence,
                _described(error),
                # A traceback tells nothing about a loss, and the second one nothing new.
                exc_info=None if quiet or where in self._failed_at else error,
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
