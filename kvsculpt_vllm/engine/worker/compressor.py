"""Executes the scheduler's commands: read the span, fit, write packed pages; later, publish them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.commands import CommitCommand, SolveCommand
from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.engine.shared.record import CompressionRecord
from kvsculpt_vllm.engine.worker import pages as page_layout
from kvsculpt_vllm.engine.worker.state import CompressionState
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import Compressed, compress_in_slices
from kvsculpt_vllm.sculpt.effort import EFFORTS
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.queries import build_in_slices
from kvsculpt_vllm.sculpt.rotary import Rotary
from kvsculpt_vllm.sculpt.slices import Slices, Stopwatch, within


class NotUsable(Exception):
    """What came out of a compression must not be used."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def reason_of(error: Exception) -> Reason:
    """Say for which reason a compression failed that raised `error`."""
    if isinstance(error, NotUsable):
        return error.reason
    # The CPU's allocator has no exception of its own.
    no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return Reason.OUT_OF_MEMORY if no_memory else Reason.EXCEPTION


class Compressor:
    """Compresses the requests of one worker, whose `state` it reads and writes. `softmax_scale` is that of all
    attention layers; adaptive budgets of the method sculpt follow the `calibration`.
    """

    def __init__(
        self,
        state: CompressionState,
        rotaries: list[Rotary | None],
        softmax_scale: float,
        calibration: LossCurves | None = None,
    ) -> None:
        self.state, self.rotaries, self.softmax_scale = state, rotaries, softmax_scale
        self.calibration = calibration

    def solve(self, command: SolveCommand, fallback: Reason | None = None) -> Slices[CompressionRecord]:
        """Compress the request's span into the blocks taken for it. The request's own blocks are only read.

        The blocks are read in the first slice and written in the last. With a `fallback`, the reason for which the
        method failed, it is done by plain selection with uniform budgets instead.

        Raises:
            NotUsable: queries are missing, or what came out is not finite.
            Exception: whatever torch raises.
        """
        clock = Stopwatch()
        record = yield from within(clock, within(torch.no_grad, self._solve(command, fallback)))
        return replace(record, seconds=clock.seconds)

    def _solve(self, command: SolveCommand, fallback: Reason | None) -> Slices[CompressionRecord]:
        state, geometry = self.state, self.state.geometry
        config = state.tracked(command.request_id).config
        if fallback is not None:
            config = config.model_copy(update={"method": "select", "budget": "uniform"})
        problems, sinks = yield from self._problems(command, config.sink)
        span_blocks = command.span_tokens // geometry.block_size
        plan = PagePlan(geometry.block_size, span_blocks, len(command.packed) * geometry.num_cells, config.sink)
        fitted = yield from compress_in_slices(
            problems,
            plan,
            config.method,
            config.budget,
            EFFORTS[config.effort],
            # It was measured with sculpt's fits.
            calibration=self.calibration if config.method == "sculpt" else None,
        )
        if not all(
            entries.isfinite().all() for entries in (fitted.start_error, fitted.error, *fitted.keys, *fitted.values)
        ):
            raise NotUsable(Reason.NOT_FINITE, "what came out is not finite")
        starts = self._write(command, fitted, *sinks)
        shape = (geometry.num_layers, geometry.num_heads)
        pages = torch.tensor(fitted.pages)
        state.directory.prepare(command.request_id, torch.tensor(starts).view(shape), pages.view(shape), span_blocks)
        return self._record(command, config, fitted, fallback)

    def commit(self, command: CommitCommand, block_bytes: int) -> CompressionRecord:
        """Publish what was solved: the request's block list starts with it from now on."""
        record = self.state.solved.pop(command.request_id)
        self.state.directory.publish(command.request_id, command.first_block)
        return replace(
            record,
            blocks_freed=command.blocks_freed,
            bytes_freed=command.blocks_freed * block_bytes,
            steps_waited=command.steps_waited,
        )

    def _record(
        self,
        command: SolveCommand,
        config: CompressionConfig,
        fitted: Compressed,
        fallback: Reason | None,
    ) -> CompressionRecord:
        geometry = self.state.geometry
        shape = (geometry.num_layers, geometry.num_heads)
        kept = torch.tensor([len(keys) for keys in fitted.keys]) + config.sink
        span_blocks = command.span_tokens // geometry.block_size
        return CompressionRecord(
            request_id=command.request_id,
            method=config.method,
            keep_ratio=config.keep_ratio,
            budget=config.budget,
            effort=config.effort,
            prompt_tokens=command.num_prompt_tokens,
            span_tokens=command.span_tokens,
            entries_kept=float(kept.float().mean()),
            blocks_before=len(command.prompt_blocks),
            blocks_after=len(command.prompt_blocks) - span_blocks + len(command.packed),
            blocks_freed=0,
            bytes_freed=0,
            steps_waited=0,
            seconds=0.0,
            error_before=float(fitted.start_error.mean()),
            error_after=float(fitted.error.mean()),
            solver_steps=int(fitted.steps.sum()),
            heads_at_start=int(((fitted.error >= fitted.start_error) & (fitted.start_error > 0)).sum()),
            failed_solves=int(fitted.failed_solves.sum()),
            budgets=kept.view(shape).tolist(),
            errors=fitted.error.view(shape).tolist(),
            fallback=str(fallback or ""),
        )

    def _problems(self, command: SolveCommand, num_sinks: int) -> Slices[tuple[Problems, tuple[Tensor, Tensor]]]:
        """What to fit, and the sinks' keys and values (L · H, sinks, D), which are kept as they are."""
        state = self.state
        sample = state.samples[command.request_id]
        if not sample.complete or sample.queries is None:
            cause = sample.failure or "some sampled queries of the prompt were never computed"
            raise NotUsable(Reason.NO_ROOM_FOR_QUERIES if sample.refused else Reason.QUERIES_MISSING, cause)
        blocks = torch.tensor(command.prompt_blocks, device=state.pages.buffer.device)
        keys, values = state.pages.read(state.geometry.block_pages(blocks))
        keys = keys.flatten(0, 1)[:, : command.num_prompt_tokens]
        values = values.flatten(0, 1)[:, : command.num_prompt_tokens]
        problems = yield from build_in_slices(
            queries=sample.queries,
            positions=sample.positions.to(keys.device),
            recent=sample.recent,
            keys=keys,
            values=values,
            span=command.span_tokens,
            sinks=num_sinks,
            rotaries=self.rotaries,
            scale=self.softmax_scale,
        )
        return problems, (keys[:, :num_sinks], values[:, :num_sinks])

    def _write(self, command: SolveCommand, fitted: Compressed, sink_keys: Tensor, sink_values: Tensor) -> list[int]:
        """Write every head's entries, sinks first, into its cells of the packed blocks; returns its first cell."""
        state = self.state
        starts = page_layout.place(fitted.pages)
        cells = state.geometry.packed_pages(torch.tensor(command.packed, device=state.pages.buffer.device))
        for b, (start, count) in enumerate(zip(starts, fitted.pages, strict=True)):
            state.pages.write(
                cells[start : start + count],
                torch.cat([sink_keys[b], fitted.keys[b]]),
                torch.cat([sink_values[b], fitted.values[b]]),
            )
        return starts
