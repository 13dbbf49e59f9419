"""Executes one compress command: read the span, fit, write packed pages, publish them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from vllm.logger import init_logger

from kvsculpt_vllm.engine import pages as page_layout
from kvsculpt_vllm.engine.capture import QuerySample
from kvsculpt_vllm.engine.command import CompressCommand
from kvsculpt_vllm.engine.state import CompressionState
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import Compressed, compress
from kvsculpt_vllm.sculpt.effort import EFFORTS
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.queries import build_problems
from kvsculpt_vllm.sculpt.rotary import Rotary

logger = init_logger("vllm.kvsculpt")


@dataclass(frozen=True)
class CompressionRecord:
    """What one compression did, as logged and reported."""

    request_id: str
    method: str
    budget: str
    prompt_tokens: int
    span_tokens: int
    entries_kept: float  # mean over layers and KV heads
    blocks_before: int  # that the prompt held
    blocks_after: int  # that it holds now: packed and tail
    blocks_freed: int  # by which the pool's free count rose (shared blocks stay in use)
    bytes_freed: int
    steps_waited: int  # scheduler steps spent uncompressed because the pool was full
    seconds: float
    error_before: float  # held-out loss of plain selection, mean over heads
    error_after: float  # held-out loss of what was written
    heads_at_start: int  # (layer, KV head)s for which selection was not beaten


class Compressor:
    """Bound to one worker's state; `softmax_scale` is the attention layers' common one."""

    def __init__(self, state: CompressionState, rotaries: list[Rotary | None], softmax_scale: float) -> None:
        self.state, self.rotaries, self.softmax_scale = state, rotaries, softmax_scale

    @torch.no_grad()
    def run(self, command: CompressCommand) -> CompressionRecord:
        """Compress the request's span into its packed blocks. The old blocks may be reused right after."""
        begin = time.perf_counter()
        state, geometry = self.state, self.state.geometry
        request = state.tracked(command.request_id)
        config = request.config
        sample = state.samples.pop(command.request_id)
        block_bytes = geometry.num_cells * state.pages.buffer[0].nbytes

        blocks = torch.tensor(command.prompt_blocks, device=state.pages.buffer.device)
        keys, values = state.pages.read(geometry.block_pages(blocks))
        keys = keys.flatten(0, 1)[:, : command.num_prompt_tokens]
        values = values.flatten(0, 1)[:, : command.num_prompt_tokens]
        problems = self._problems(command, config.sink, sample, keys, values)
        plan = PagePlan(
            block_size=geometry.block_size,
            span_pages=command.span_tokens // geometry.block_size,
            total=command.packed_blocks * geometry.num_cells,
            sinks=config.sink,
        )
        fitted = compress(problems, plan, config.method, config.budget, EFFORTS[config.effort])
        self._write(command, fitted, keys[:, : config.sink], values[:, : config.sink])
        kept = torch.tensor([len(k) for k in fitted.keys], dtype=torch.float32) + config.sink
        span_blocks = command.span_tokens // geometry.block_size
        record = CompressionRecord(
            request_id=command.request_id,
            method=config.method,
            budget=config.budget,
            prompt_tokens=command.num_prompt_tokens,
            span_tokens=command.span_tokens,
            entries_kept=float(kept.mean()),
            blocks_before=len(command.prompt_blocks),
            blocks_after=len(command.prompt_blocks) - span_blocks + command.packed_blocks,
            blocks_freed=command.blocks_freed,
            bytes_freed=command.blocks_freed * block_bytes,
            steps_waited=command.steps_waited,
            seconds=time.perf_counter() - begin,
            error_before=float(fitted.start_error.mean()),
            error_after=float(fitted.error.mean()),
            heads_at_start=int(((fitted.error >= fitted.start_error) & (fitted.start_error > 0)).sum()),
        )
        return record

    def _problems(
        self, command: CompressCommand, sinks: int, sample: QuerySample, keys: Tensor, values: Tensor
    ) -> Problems:
        if not sample.complete:
            raise RuntimeError(f"request {command.request_id}: some sampled queries of its prompt were never computed")
        return build_problems(
            queries=sample.queries,
            positions=sample.positions.to(keys.device),
            recent=sample.recent,
            keys=keys,
            values=values,
            span=command.span_tokens,
            sinks=sinks,
            rotaries=self.rotaries,
            scale=self.softmax_scale,
        )

    def _write(self, command: CompressCommand, fitted: Compressed, sink_keys: Tensor, sink_values: Tensor) -> None:
        """Write every head's entries, sinks first, into its cells of the packed blocks, and publish where they are."""
        state, geometry = self.state, self.state.geometry
        starts = page_layout.place(fitted.pages)
        packed = torch.tensor(command.row[: command.packed_blocks], device=state.pages.buffer.device)
        cells = geometry.packed_pages(packed)
        for b, (start, count) in enumerate(zip(starts, fitted.pages, strict=True)):
            state.pages.write(
                cells[start : start + count],
                torch.cat([sink_keys[b], fitted.keys[b]]),
                torch.cat([sink_values[b], fitted.values[b]]),
            )
        shape = (geometry.num_layers, geometry.num_heads)
        state.directory.publish(
            command.request_id,
            command.first_block,
            torch.tensor(starts).view(shape),
            torch.tensor(fitted.pages).view(shape),
            command.span_tokens // geometry.block_size,
        )


def log(record: CompressionRecord) -> None:
    """The one line a compressed request leaves in the log."""
    logger.info(
        "kvsculpt: request %(request_id)s: %(method)s/%(budget)s, span %(span_tokens)d tokens, "
        "%(entries_kept).0f entries kept a head, %(blocks_freed)d blocks freed (%(blocks_before)d -> "
        "%(blocks_after)d), %(seconds).2f s, held-out error %(error_before).4f -> %(error_after).4f",
        asdict(record),
    )
