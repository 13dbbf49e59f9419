"""Scheduler side: swap a prompt's blocks for a packed prefix once the prompt is computed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine import spans
from kvsculpt_vllm.engine.command import CompressCommand, attach
from kvsculpt_vllm.engine.compat import SchedulerHooks
from kvsculpt_vllm.engine.refusals import check_kv_cache_config

logger = init_logger("vllm.kvsculpt")

NEVER_HASH = 1 << 30
"""More cached blocks than a request can have: vLLM then never hashes the approximated tail."""


class SculptSchedulerMixin(SchedulerHooks):
    """Takes fresh blocks for a packed prefix and gives the prompt's blocks back to vLLM's own pool.

    It runs at the start of `schedule`: a request whose whole prompt has been *scheduled* will have it computed when
    the workers see this step's output, because they work first in, first out (also with async scheduling and
    pipeline parallelism).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_kv_cache_config(self.kv_cache_config)
        self.compression = CompressionConfig.from_additional_config(self.vllm_config.additional_config)
        self.compression_waits = 0
        self._settled: set[str] = set()  # compressed, or to stay exact
        self._steps_waited: Counter[str] = Counter()
        self._hit_shortened: set[str] = set()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        commands = self._swap_finished_prompts()
        output = super().schedule(*args, **kwargs)
        if commands:
            # A request preempted in this very step has lost its blocks again: its command must not run.
            running = {request.request_id for request in self.running}
            attach(output, [command for command in commands if command.request_id in running])
        return output

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
        self._settled.discard(request_id)
        self._steps_waited.pop(request_id, None)
        self._hit_shortened.discard(request_id)

    def _span(self, request: Request) -> spans.Span | None:
        params = request.sampling_params
        if params is None or request.resumable:
            return None  # pooling has no decode; a streaming session's prompt is not complete
        if params.max_tokens is not None and params.max_tokens <= 1:
            return None  # the prefill itself gives the only token: nothing would read the packed prefix
        config = self.compression.for_request(params.extra_args)
        return spans.plan_span(config, request.num_prompt_tokens, self.block_size)

    def _swap_finished_prompts(self) -> list[CompressCommand]:
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
            command = self._swap(request, span) if span is not None else None
            if command is not None or span is None:
                self._settled.add(request.request_id)
            if command is not None:
                # One a step: the others decode in between, and no step takes as long as several compressions.
                return [command]
        return []

    def _swap(self, request: Request, span: spans.Span) -> CompressCommand | None:
        """Rewrite the request's block list; None if it has to wait: for free blocks, or for others to finish.

        Blocks that other requests share are not freed by this one letting go of them. While fewer would come free
        than the packed prefix takes, compression would cost memory.
        """
        pool = self.kv_cache_manager.block_pool
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        blocks = manager.req_to_blocks[request.request_id]
        old = blocks[: span.blocks]
        if sum(block.ref_cnt == 1 for block in old) < span.packed_blocks:
            return None
        free_before = pool.get_num_free_blocks()
        if free_before < span.packed_blocks:
            if request.request_id not in self._steps_waited:
                logger.info(
                    "kvsculpt: request %s waits uncompressed: %d free blocks needed, %d there",
                    request.request_id,
                    span.packed_blocks,
                    free_before,
                )
            self._steps_waited[request.request_id] += 1
            self.compression_waits += 1
            return None
        prompt_blocks = [block.block_id for block in blocks[: -(-request.num_prompt_tokens // self.block_size)]]
        packed = pool.get_new_blocks(span.packed_blocks)
        blocks[: span.blocks] = packed + [pool.null_block] * (span.blocks - span.packed_blocks)
        manager.num_cached_block[request.request_id] = NEVER_HASH
        # Freeing at once is safe: the workers read these blocks before the forward pass of this same step, which
        # is the first that could write to them. Reversed, as vLLM does, so that a prefix's end is evicted first.
        pool.free_blocks(reversed(old))
        return CompressCommand(
            request_id=request.request_id,
            num_prompt_tokens=request.num_prompt_tokens,
            span_tokens=span.tokens,
            prompt_blocks=prompt_blocks,
            row=[block.block_id for block in blocks],
            packed_blocks=span.packed_blocks,
            blocks_freed=pool.get_num_free_blocks() - free_before,
            steps_waited=self._steps_waited.pop(request.request_id, 0),
        )


class SculptScheduler(SculptSchedulerMixin, Scheduler):
    """The mixin over vLLM's synchronous scheduler."""


class SculptAsyncScheduler(SculptSchedulerMixin, AsyncScheduler):
    """The mixin over vLLM's asynchronous scheduler."""
