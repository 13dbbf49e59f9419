"""Scheduler side: swap a prompt's blocks for a packed prefix once the prompt is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine import spans
from kvsculpt_vllm.engine.command import CommitCommand, SolveCommand, Solved, attach, attached
from kvsculpt_vllm.engine.compat import SchedulerHooks
from kvsculpt_vllm.engine.refusals import check_kv_cache_config

logger = init_logger("vllm.kvsculpt")

NEVER_HASH = 1 << 30
"""More cached blocks than a request can have: vLLM then never hashes the approximated tail."""


@dataclass
class Pending:
    """A compression between its two phases."""

    attempt: int
    span: spans.Span
    packed: list[KVCacheBlock]  # taken from the pool, in no block list yet
    solved: bool = False


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
        self.compression_waits = 0
        self.kept_exact = 0  # requests whose compression failed or lost too much
        self._pending: dict[str, Pending] = {}
        self._attempts = count()
        self._settled: set[str] = set()  # being compressed, compressed, or to stay exact
        self._steps_waited: Counter[str] = Counter()
        self._hit_shortened: set[str] = set()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        commands = [*self._commit_solved(), *self._start_one()]
        output = super().schedule(*args, **kwargs)
        if commands:
            # A request preempted in this very step has lost its blocks again: its command must not run.
            running = {request.request_id for request in self.running}
            attach(output, [command for command in commands if command.request_id in running])
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        for solved in attached(model_runner_output):
            self._hear(solved)
        return super().update_from_output(scheduler_output, model_runner_output)

    def limit_prefix_hit(self, request: Request, blocks: KVCacheBlocks, num_tokens: int) -> tuple[KVCacheBlocks, int]:
        """Shorten a prefix-cache hit of a prompt to be compressed: without queries there is nothing to fit to."""
        if num_tokens == 0 or self._span(request) is None:
            return blocks, num_tokens
        most = spans.longest_useful_hit(request.num_prompt_tokens, self.block_size)
        if num_tokens <= most:
            return blocks, num_tokens
        if request.request_id not in self._hit_shortened:  # a waiting request is looked up anew at every step
            self._hit_shortened.add(request.request_id)
            logger.info(
                "kvsculpt: request %s: prefix-cache hit shortened from %d to %d of %d prompt tokens, "
                "so that its last queries are seen",
                request.request_id,
                num_tokens,
                most,
                request.num_prompt_tokens,
            )
        return self.kv_cache_manager.truncate_computed_blocks(blocks, most), most

    def forget(self, request_id: str) -> None:
        """The request lost its blocks (finished, aborted or preempted)."""
        if request_id in self._pending:
            self._drop(request_id)
        self._settled.discard(request_id)
        self._steps_waited.pop(request_id, None)
        self._hit_shortened.discard(request_id)

    def _span(self, request: Request) -> spans.Span | None:
        params = request.sampling_params
        if params is None or request.resumable:
            return None  # pooling has no decode; a streaming session's prompt is not complete
        if params.max_tokens is not None and params.max_tokens <= 2:
            return None  # the prefill gives one token, the step that solves another: nothing would read the prefix
        config = self.compression.for_request(params.extra_args)
        return spans.plan_span(config, request.num_prompt_tokens, self.block_size)

    def _start_one(self) -> list[SolveCommand]:
        """The command for the first running request that can be compressed now, if there is one."""
        for request in self.running:
            if (
                request.request_id in self._settled
                or request.status != RequestStatus.RUNNING
                or request.is_prefill_chunk
                or request.num_computed_tokens < request.num_prompt_tokens
            ):
                continue
            span = self._span(request)
            command = self._start(request, span) if span is not None else None
            if command is not None or span is None:
                self._settled.add(request.request_id)
            if command is not None:
                # One a step: the others decode in between, and no step takes as long as several compressions.
                return [command]
        return []

    def _start(self, request: Request, span: spans.Span) -> SolveCommand | None:
        """Take blocks for the packed prefix; None if it has to wait: for free blocks, or for others to finish.

        Blocks that other requests share are not freed by this one letting go of them. While fewer would come free
        than the packed prefix takes, compression would cost memory.
        """
        pool, blocks = self.kv_cache_manager.block_pool, self._blocks(request.request_id)
        if not self._comes_free(request.request_id, span):
            return None
        free = pool.get_num_free_blocks()
        if free < span.packed_blocks:
            if request.request_id not in self._steps_waited:
                logger.info(
                    "kvsculpt: request %s waits uncompressed: %d free blocks needed, %d there",
                    request.request_id,
                    span.packed_blocks,
                    free,
                )
            self._steps_waited[request.request_id] += 1
            self.compression_waits += 1
            return None
        pending = Pending(next(self._attempts), span, pool.get_new_blocks(span.packed_blocks))
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
        if solved.failure is None:
            pending.solved = True
        else:
            self.kept_exact += 1
            self._drop(solved.request_id)

    def _drop(self, request_id: str) -> None:
        """Give back what was taken for a packed prefix that will not be used."""
        self.kv_cache_manager.block_pool.free_blocks(reversed(self._pending.pop(request_id).packed))

    def _commit_solved(self) -> Iterator[CommitCommand]:
        for request_id in [request_id for request_id, pending in self._pending.items() if pending.solved]:
            if self._comes_free(request_id, self._pending[request_id].span):
                yield self._commit(request_id, self._pending.pop(request_id))
            else:  # others have come to share its blocks meanwhile
                self._drop(request_id)

    def _commit(self, request_id: str, pending: Pending) -> CommitCommand:
        """Rewrite the request's block list."""
        pool, blocks, span = self.kv_cache_manager.block_pool, self._blocks(request_id), pending.span
        old, free_before = blocks[: span.blocks], pool.get_num_free_blocks()
        blocks[: span.blocks] = pending.packed + [pool.null_block] * (span.blocks - span.packed_blocks)
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        manager.num_cached_block[request_id] = NEVER_HASH
        # Freeing at once is safe: the workers change the request's row before the forward pass of this same step,
        # which is the first that could write to them. Reversed, as vLLM does: a prefix's end is evicted first.
        pool.free_blocks(reversed(old))
        return CommitCommand(
            request_id=request_id,
            row=[block.block_id for block in blocks],
            # Counted with the blocks that the packed prefix took.
            blocks_freed=pool.get_num_free_blocks() - free_before - span.packed_blocks,
            steps_waited=self._steps_waited.pop(request_id, 0),
        )

    def _comes_free(self, request_id: str, span: spans.Span) -> bool:
        """Whether letting go of the span's blocks frees at least as many as the packed prefix takes."""
        return sum(block.ref_cnt == 1 for block in self._blocks(request_id)[: span.blocks]) >= span.packed_blocks

    def _blocks(self, request_id: str) -> list[KVCacheBlock]:
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        return manager.req_to_blocks[request_id]


class SculptScheduler(SculptSchedulerMixin, Scheduler):
    """The mixin over vLLM's synchronous scheduler."""


class SculptAsyncScheduler(SculptSchedulerMixin, AsyncScheduler):
    """The mixin over vLLM's asynchronous scheduler."""
