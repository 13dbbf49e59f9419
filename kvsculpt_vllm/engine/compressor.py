"""Executes the scheduler's commands: read the span, fit, write packed pages; later, publish them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from vllm.logger import init_logger

from kvsculpt_vllm.engine import pages as page_layout
from kvsculpt_vllm.engine.capture import QuerySample
from kvsculpt_vllm.engine.command import CommitCommand, SolveCommand
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


@dataclass(frozen=True)
class PackedPrefix:
    """What is written and not yet read: per (layer, KV head) its first cell and number of pages."""

    starts: list[int]
    pages: list[int]
    span_blocks: int
    record: CompressionRecord


class TooMuchLost(Exception):
    """The compression's held-out error is above the bound that the request or the server sets."""


class Compressor:
    """Bound to one worker's state; `softmax_scale` is the attention layers' common one."""

    def __init__(self, state: CompressionState, rotaries: list[Rotary | None], softmax_scale: float) -> None:
        self.state, self.rotaries, self.softmax_scale = state, rotaries, softmax_scale

    @torch.no_grad()
    def solve(self, command: SolveCommand) -> None:
        """Compress the request's span into the blocks taken for it. The request's own blocks are only read.

        Raises:
            TooMuchLost: the error is above the bound.
            RuntimeError: queries are missing, or what came out is not finite; and whatever torch raises.
        """
        begin = time.perf_counter()
        state, geometry = self.state, self.state.geometry
        config = state.tracked(command.request_id).config
        sample = state.samples.pop(command.request_id)
        blocks = torch.tensor(command.prompt_blocks, device=state.pages.buffer.device)
        keys, values = state.pages.read(geometry.block_pages(blocks))
        keys = keys.flatten(0, 1)[:, : command.num_prompt_tokens]
        values = values.flatten(0, 1)[:, : command.num_prompt_tokens]
        problems = self._problems(command, config.sink, sample, keys, values)
        span_blocks = command.span_tokens // geometry.block_size
        plan = PagePlan(geometry.block_size, span_blocks, len(command.packed) * geometry.num_cells, config.sink)
        fitted = compress(problems, plan, config.method, config.budget, EFFORTS[config.effort])
        error = float(fitted.error.mean())
        if not error <= config.max_error:
            raise TooMuchLost(f"held-out error {error:.4g}, at most {config.max_error:g} is allowed")
        if not all(entries.isfinite().all() for entries in (*fitted.keys, *fitted.values)):
            raise RuntimeError("compressed entries are not finite")
        starts = self._write(command, fitted, keys[:, : config.sink], values[:, : config.sink])
        kept = torch.tensor([len(k) for k in fitted.keys], dtype=torch.float32) + config.sink
        record = CompressionRecord(
            request_id=command.request_id,
            method=config.method,
            budget=config.budget,
            prompt_tokens=command.num_prompt_tokens,
            span_tokens=command.span_tokens,
            entries_kept=float(kept.mean()),
            blocks_before=len(command.prompt_blocks),
            blocks_after=len(command.prompt_blocks) - span_blocks + len(command.packed),
            blocks_freed=0,
            bytes_freed=0,
            steps_waited=0,
            seconds=time.perf_counter() - begin,
            error_before=float(fitted.start_error.mean()),
            error_after=error,
            heads_at_start=int(((fitted.error >= fitted.start_error) & (fitted.start_error > 0)).sum()),
        )
        state.solved[command.request_id] = PackedPrefix(starts, fitted.pages, span_blocks, record)

    def commit(self, command: CommitCommand) -> CompressionRecord:
        """Publish what was solved: the request's block list starts with it from now on."""
        state, geometry = self.state, self.state.geometry
        prefix = state.solved.pop(command.request_id)
        shape = (geometry.num_layers, geometry.num_heads)
        state.directory.publish(
            command.request_id,
            command.row[0],
            torch.tensor(prefix.starts).view(shape),
            torch.tensor(prefix.pages).view(shape),
            prefix.span_blocks,
        )
        return replace(
            prefix.record,
            blocks_freed=command.blocks_freed,
            bytes_freed=command.blocks_freed * geometry.num_cells * state.pages.buffer[0].nbytes,
            steps_waited=command.steps_waited,
        )

    def _problems(
        self, command: SolveCommand, sinks: int, sample: QuerySample, keys: Tensor, values: Tensor
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


def log(record: CompressionRecord) -> None:
    """The one line a compressed request leaves in the log."""
    logger.info(
        "kvsculpt: request %(request_id)s: %(method)s/%(budget)s, span %(span_tokens)d tokens, "
        "%(entries_kept).0f entries kept a head, %(blocks_freed)d blocks freed (%(blocks_before)d -> "
        "%(blocks_after)d), %(seconds).2f s, held-out error %(error_before).4f -> %(error_after).4f",
        asdict(record),
    )
