"""The one place that touches vLLM's private methods and attributes. Each entry says when it can go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the start-up hooks import this file in every vLLM process: it must stay light
    from vllm.engine.arg_utils import EngineArgs
    from vllm.engine.protocol import EngineClient
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class SchedulerHooks:
    """Gives the scheduler mixin public names for hooks that vLLM's scheduler does not offer.

    Can go when vLLM has a public hook for prefix-cache hits, admission, the size of a chunk, and a request losing its
    blocks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        allocate_slots = self.kv_cache_manager.allocate_slots

        def if_admitted(request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
            if not self.admits(request, kwargs.get("new_computed_blocks")):
                return None  # what vLLM knows as: no room yet
            return allocate_slots(request, *args, **kwargs)

        self.kv_cache_manager.allocate_slots = if_admitted

    def admits(self, request: Request, hit: KVCacheBlocks | None) -> bool:
        """Whether a request may get blocks now; `hit` are those that one not yet running found in the prefix cache."""
        raise NotImplementedError

    def limit_prefix_hit(self, request: Request, blocks: KVCacheBlocks, num_tokens: int) -> tuple[KVCacheBlocks, int]:
        """The part of a local prefix-cache hit to use."""
        raise NotImplementedError

    def limit_chunk(self, request: Request, num_left: int, num_tokens: int) -> int:
        """Tokens to compute now, of `num_tokens` after which `num_left` known ones would be left."""
        raise NotImplementedError

    def forget(self, request: Request) -> None:
        """The request's blocks are about to go back to the pool."""
        raise NotImplementedError

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        blocks, num_tokens = self.limit_prefix_hit(request, blocks, num_tokens)
        return blocks, num_tokens, boundary, diverged

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        num_left = request.num_tokens - num_computed_tokens - num_new_tokens
        return self.limit_chunk(request, num_left, num_new_tokens)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.forget(request)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.forget(request)
        return super()._free_request(request, *args, **kwargs)


class BlockRows:
    """Replaces running requests' block lists in a model runner, V1 or V2, before its next forward pass.

    V2 stages changes of its tables and applies them at the beginning of its step. V1 has one table on the host, from
    which the copy of an earlier step may still be read: there a change waits for the runner's own update of its
    state, before which the runner waits for that copy. Can go when a scheduler output can say that a running request's
    block list was replaced.
    """

    def __init__(self, runner: Any) -> None:
        self._runner, self._waiting = runner, {}
        self._staged = hasattr(runner, "req_states")  # V2
        if not self._staged:
            update_states = runner._update_states

            def with_replaced_rows(scheduler_output: SchedulerOutput) -> Any:
                self._apply()  # first: blocks that come with this step are appended to the new list
                return update_states(scheduler_output)

            runner._update_states = with_replaced_rows

    def replace(self, request_id: str, row: list[int]) -> None:
        """From the next step on, `row` is the request's block list."""
        if self._staged:
            index = self._runner.req_states.req_id_to_index[request_id]
            self._runner.block_tables.append_block_ids(index, (row,), overwrite=True)
        else:
            self._waiting[request_id] = row

    def _apply(self) -> None:
        batch = self._runner.input_batch
        for request_id, row in self._waiting.items():
            self._runner.requests[request_id].block_ids[0][:] = row
            index = batch.req_id_to_index.get(request_id)
            if index is not None:  # else it is not in the batch now and comes back with the list above
                batch.block_table[0].add_row(row, index)
        self._waiting.clear()


def row_request_ids(runner: Any, metadata: CommonAttentionMetadata) -> list[str]:
    """The request of each row of a batch; empty for a batch that serves no request (warm-up)."""
    if hasattr(runner, "req_states"):  # V2
        if metadata.req_idx is None:
            return []
        index_to_id = runner.req_states.index_to_req_id
        return [index_to_id.get(int(index), "") for index in np.asarray(metadata.req_idx)[: metadata.num_reqs]]
    return list(runner.input_batch.req_ids[: metadata.num_reqs])


def use_plain_vector_pages(builder: CPUAttentionMetadataBuilder, layer_names: list[str]) -> None:
    """Keep pages in the layout of the plain vector kernels: the AMX kernel permutes keys and values inside a page.

    Can go when pages are read and written in the AMX order too.
    """
    if builder.isa == "amx":
        builder.isa = "vec"
        builder._set_isa_to_layers(layer_names)


def is_extra_api_server(args: EngineArgs) -> bool:
    """Whether these engine arguments are those of one of several API servers, after their parent's.

    Can go when vLLM's configuration says so publicly.
    """
    return args._api_process_count > 1 and args._api_process_rank >= 0


async def ask_engines(client: EngineClient, method: str, args: tuple) -> list[Any]:
    """What the first worker of every engine answers to `method`.

    `EngineClient.collective_rpc` answers for the first engine only where there are several (data parallelism). Can go
    when it answers for all.
    """
    call = ("collective_rpc", method, None, args, None)
    return [workers[0] for workers in await client.engine_core.call_utility_all_async(*call)]
