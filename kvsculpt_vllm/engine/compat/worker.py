"""vLLM's model runners and attention builders, by public names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from kvsculpt_vllm.engine.compat.patcher import apply
from kvsculpt_vllm.engine.compat.patches import BOOKKEEPING_SYNC, SAMPLE, UPDATE_STATES

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
    from vllm.v1.core.sched.output import SchedulerOutput


class BlockRows:
    """Replaces running requests' block lists in a model runner, V1 or V2, before its next forward pass: those of one KV
    cache group.

    V2 stages changes of its tables and applies them at the beginning of its step. V1 has one table on the host, from
    which the copy of an earlier step may still be read: there a change waits for the runner's own update of its
    state, before which the runner waits for that copy.
    """

    def __init__(self, runner: Any, group: int = 0) -> None:
        self._runner, self._group = runner, group
        self._waiting: dict[str, list[int]] = {}
        self._staged = hasattr(runner, "req_states")  # V2
        if not self._staged:

            def with_replaced_rows(update_states: Callable[..., Any]) -> Callable[..., Any]:
                def wrapped(scheduler_output: SchedulerOutput) -> Any:
                    self._apply()  # first: blocks that come with this step are appended to the new list
                    return update_states(scheduler_output)

                return wrapped

            apply(UPDATE_STATES, with_replaced_rows, instance=runner)

    def replace(self, request_id: str, row: list[int]) -> None:
        """From the next step on, `row` is the request's block list."""
        if self._staged:
            index, tables = self._runner.req_states.req_id_to_index[request_id], self._runner.block_tables
            # As `append_block_ids` does, which would write to all groups.
            tables.block_tables[self._group].stage_write(index, 0, row)
            tables.num_blocks.np[self._group, index] = len(row)
        else:
            self._waiting[request_id] = row

    def _apply(self) -> None:
        batch = self._runner.input_batch
        for request_id, row in self._waiting.items():
            self._runner.requests[request_id].block_ids[self._group][:] = row
            index = batch.req_id_to_index.get(request_id)
            if index is not None:  # else it is not in the batch now and comes back with the list above
                batch.block_table[self._group].add_row(row, index)
        self._waiting.clear()


class OutputToCome(AsyncModelRunnerOutput):
    """An output that is still being computed, and what is done with it once it is there."""

    def __init__(
        self, output: AsyncModelRunnerOutput, finish: Callable[[ModelRunnerOutput], ModelRunnerOutput]
    ) -> None:
        self._output: Any = output
        self._finish = finish

    def get_output(self) -> ModelRunnerOutput:
        """The finished output."""
        return self._finish(self._output.get_output())

    def get_kv_connector_output(self) -> Any:
        """What vLLM 0.33 saves of a step whose output cannot be had; 0.32 has no such method and never asks."""
        return self._output.get_kv_connector_output()


def rewind_discarded_draws(runner: Any) -> None:
    """Let seeded requests be computed in chunks on a CPU with the V1 model runner.

    vLLM samples after every chunk of a prompt and throws away what no token follows from. The draw has moved a seeded
    request's generator on, so vLLM sets the generator's offset back; a CPU generator has no offset, and the error ends
    the engine. Here its state is put back instead, and vLLM does not see the generator meanwhile.
    """

    def discarded() -> dict[int, torch.Generator]:
        batch = runner.input_batch
        rows = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0]
        return {row: batch.generators[row] for row in map(int, rows) if row in batch.generators}

    def with_states_put_back(sample: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before = [(generator, generator.get_state()) for generator in discarded().values()]
            result = sample(*args, **kwargs)
            for generator, state in before:
                generator.set_state(state)
            return result

        return wrapped

    def without_them(bookkeeping: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            hidden = discarded()
            for row in hidden:
                del runner.input_batch.generators[row]
            try:
                return bookkeeping(*args, **kwargs)
            finally:
                runner.input_batch.generators.update(hidden)

        return wrapped

    apply(SAMPLE, with_states_put_back, instance=runner)
    apply(BOOKKEEPING_SYNC, without_them, instance=runner)


def block_table_columns(runner: Any, group: int = 0) -> int:
    """Columns of the block table that a model runner, V1 or V2, gives to the attention of a KV cache group."""
    if hasattr(runner, "req_states"):  # V2
        return int(runner.block_tables.input_block_tables[group].shape[1])
    return int(runner.input_batch.block_table[group].get_device_tensor(1).shape[1])


def row_request_ids(runner: Any, metadata: CommonAttentionMetadata) -> list[str]:
    """The request of each row of a batch; empty for a batch that serves no request (warm-up)."""
    if hasattr(runner, "req_states"):  # V2
        if metadata.req_idx is None:
            return []
        index_to_id = runner.req_states.index_to_req_id
        return [index_to_id.get(int(index), "") for index in np.asarray(metadata.req_idx)[: metadata.num_reqs]]
    return list(runner.input_batch.req_ids[: metadata.num_reqs])


@torch.inference_mode()
def run_model(runner: Any, positions: Tensor) -> None:
    """The model's forward pass, not compiled and for no request, of one token again and again at `positions` (N,).

    There is nothing for attention to attend to: the caller stands in for it.
    """
    config, model, count = runner.vllm_config, runner.get_model(), len(positions)
    if config.model_config.uses_mrope:
        positions = positions.expand(config.model_config.mrope_num_dims, -1)
    embeddings = None
    if not get_pp_group().is_first_rank:
        embeddings = model.make_empty_intermediate_tensors(count, config.model_config.dtype, positions.device)
        for tensor in embeddings.tensors.values():
            tensor.fill_(1)
    scheduled = np.array([count], dtype=np.int32)
    with (
        runner.maybe_dummy_run_with_lora(config.lora_config, scheduled, np.ones_like(scheduled)),
        set_forward_context(None, config, num_tokens=count, skip_compiled=True),
    ):
        model(
            input_ids=torch.zeros(count, dtype=torch.long, device=positions.device),
            positions=positions,
            intermediate_tensors=embeddings,
            inputs_embeds=None,
        )


def use_plain_vector_pages(builder: CPUAttentionMetadataBuilder, layer_names: list[str]) -> None:
    """Keep pages in the layout of the plain vector kernels: the AMX kernel permutes keys and values inside a page."""
    if builder.isa == "amx":
        builder.isa = "vec"
        builder._set_isa_to_layers(layer_names)
