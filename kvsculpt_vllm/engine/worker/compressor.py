"""Executes the scheduler's commands: read a run of tokens, fit, write packed pages; later, publish them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.commands import CommitCommand, SolveCommand
from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.engine.shared.record import CompressionRecord
from kvsculpt_vllm.engine.worker import pages as page_layout
from kvsculpt_vllm.engine.worker.earlier import packed_entries
from kvsculpt_vllm.engine.worker.state import CompressionState
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import Compressed, FittedBatch
from kvsculpt_vllm.sculpt.effort import EFFORTS, Effort
from kvsculpt_vllm.sculpt.layerwise import compress_segment_in_slices
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.queries import sample_positions
from kvsculpt_vllm.sculpt.rotary import Rotary
from kvsculpt_vllm.sculpt.segment_source import SegmentSource
from kvsculpt_vllm.sculpt.slices import Slices, Stopwatch, within
from kvsculpt_vllm.sculpt.transfer import on_device


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
    attention layers, as is `soft_cap`, and `sink_logits` tells what `softmax.sink_logits_of` does; adaptive budgets of
    the method sculpt follow the `calibration`.
    """

    def __init__(
        self,
        state: CompressionState,
        rotaries: list[Rotary | None],
        softmax_scale: float,
        calibration: LossCurves | None = None,
        sink_logits: Callable[[], Tensor | None] = lambda: None,
        soft_cap: float | None = None,
    ) -> None:
        self.state, self.rotaries, self.softmax_scale = state, rotaries, softmax_scale
        self.calibration, self.sink_logits, self.soft_cap = calibration, sink_logits, soft_cap

    def solve(self, command: SolveCommand, fallback: Reason | None = None) -> Slices[CompressionRecord]:
        """Compress a run of the request's tokens into the blocks taken for it. Its own blocks are only read.

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
        config = state.config_of(command.request_id)
        if fallback is not None:
            config = config.model_copy(update={"method": "select", "budget": "uniform"})
        # The sinks are the first tokens of the prompt, and so of its first segment.
        num_sinks = 0 if command.first_token else config.sink
        effort = EFFORTS[config.effort]
        source = self._source(command, num_sinks, effort)
        span_blocks = command.span_tokens // geometry.block_size
        plan = PagePlan(geometry.block_size, span_blocks, len(command.packed) * geometry.num_cells, num_sinks)
        device = state.pages.buffer.device
        cells = geometry.packed_pages(on_device(command.packed, device))
        extremes: list[Tensor] = []

        def write(fitted: FittedBatch, pages: list[int]) -> None:
            """Write heads' entries, sinks first, into their cells of the packed blocks, which nobody reads yet."""
            extremes.extend(torch.stack(x.aminmax()) for x in (fitted.keys, fitted.values))
            where = on_device(fitted.numbers, device)
            keys = torch.cat([source.keys[where, :num_sinks], fitted.keys], dim=1)
            values = torch.cat([source.values[where, :num_sinks], fitted.values], dim=1)
            # All heads at once: the pages of the batch, and in which cells they belong.
            starts, most = page_layout.place(pages), keys.shape[1] // geometry.block_size
            of_batch: list[int] = []
            of_block: list[int] = []
            for row, b in enumerate(fitted.numbers):
                of_batch += range(row * most, row * most + pages[b])
                of_block += range(starts[b], starts[b] + pages[b])
            chosen = on_device(of_batch, device)
            state.pages.write(
                cells[on_device(of_block, device)],
                *(x.reshape(-1, geometry.block_size, x.shape[2])[chosen].flatten(0, 1) for x in (keys, values)),
            )

        fitted = yield from compress_segment_in_slices(
            source,
            plan,
            config.method,
            config.budget,
            effort,
            write,
            # It was measured with sculpt's fits.
            calibration=self.calibration if config.method == "sculpt" else None,
            storage=state.storage,
        )
        judged = self._judged(fitted, extremes)
        shape = (geometry.num_layers, geometry.num_heads)
        starts, pages = torch.tensor(page_layout.place(fitted.pages)), torch.tensor(fitted.pages)
        state.directory.prepare(command.request_id, starts.view(shape), pages.view(shape), span_blocks)
        return self._record(command, config, plan, judged, fallback)

    def _judged(self, fitted: Compressed, extremes: list[Tensor]) -> Compressed:
        """The same on the host: the one time that a solve waits for the device, when it has nothing left to do.

        Raises:
            NotUsable: an error, or an entry by the `extremes` of all of them, is not finite.
        """
        found = torch.stack([fitted.start_error, fitted.error, fitted.steps, fitted.failed_solves])  # as float32
        found = torch.cat([found.flatten(), torch.cat(extremes).float()]).cpu()
        if not found.isfinite().all():
            raise NotUsable(Reason.NOT_FINITE, "what came out is not finite")
        start_error, error, steps, failed = found[: 4 * len(fitted.pages)].view(4, -1)
        return replace(fitted, start_error=start_error, error=error, steps=steps, failed_solves=failed)

    def commit(self, command: CommitCommand, block_bytes: int) -> CompressionRecord:
        """Publish what was solved: block lists have it from now on."""
        record = self.state.solved.pop(command.request_id)
        self.state.directory.publish(command.request_id, command.packed[0])
        return replace(
            record,
            blocks_freed=command.blocks_freed,
            bytes_freed=command.blocks_freed * block_bytes,
            steps_waited=command.steps_waited,
            times_made=command.times_made,
        )

    def _record(
        self,
        command: SolveCommand,
        config: CompressionConfig,
        plan: PagePlan,
        fitted: Compressed,
        fallback: Reason | None,
    ) -> CompressionRecord:
        geometry = self.state.geometry
        shape = (geometry.num_layers, geometry.num_heads)
        kept = torch.tensor([plan.entries(pages) + plan.sinks for pages in fitted.pages])
        span_blocks = command.span_tokens // geometry.block_size
        return CompressionRecord(
            request_id=command.request_id,
            method=config.method,
            keep_ratio=config.kept(command.num_prompt_tokens),
            budget=config.budget,
            effort=config.effort,
            prompt_tokens=command.num_prompt_tokens,
            span_tokens=command.span_tokens,
            entries_kept=float(kept.float().mean()),
            blocks_before=command.blocks_held,
            blocks_after=command.blocks_held - span_blocks + len(command.packed),
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

    def _source(self, command: SolveCommand, num_sinks: int, effort: Effort) -> SegmentSource:
        """What the problems of the segment are made of."""
        state, first = self.state, command.first_token
        end = first + command.span_tokens + command.window
        sample = state.samples.get(command.request_id)
        if sample is None or not sample.covers(first, end):
            cause = (sample and sample.failure) or "some queries of the prompt were never seen"
            raise NotUsable(Reason.QUERIES_MISSING, cause)
        blocks = on_device(command.exact, state.pages.buffer.device)
        keys, values = state.pages.read(state.geometry.block_pages(blocks))
        keys = keys.flatten(0, 1)[:, : end - first]
        values = values.flatten(0, 1)[:, : end - first]
        position_bytes = (
            state.geometry.num_layers * state.num_query_heads * state.pages.head_size * state.dtype.itemsize
        )
        positions, recent = sample_positions(first, end, effort.positions_for(position_bytes))
        return SegmentSource(
            queries=sample.at(positions),
            positions=positions,
            recent=recent,
            keys=keys,
            values=values,
            span=command.span_tokens,
            sinks=num_sinks,
            rotaries=self.rotaries,
            scale=self.softmax_scale,
            first=first,
            earlier=packed_entries(state, command.earlier) if command.earlier else None,
            sink_logits=self.sink_logits(),
            soft_cap=self.soft_cap,
            followed=command.followed,
        )
