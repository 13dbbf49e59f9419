"""Compress a context as the engine does and compare what the model says then with what it says from the full cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.spans import plan_span
from kvsculpt_vllm.evaluation.attention import RaggedCache, Recorder
from kvsculpt_vllm.evaluation.methods.base import Method
from kvsculpt_vllm.evaluation.methods.biased import BiasedCompressed
from kvsculpt_vllm.evaluation.metrics import TokenScores, compare
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.evaluation.texts import Passage
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import Compressed
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.queries import build_problems, sample_positions

HEADS = {
    "difficulty": "the pilot's error at the uniform budget, as adaptive budgets weigh it (0: they are uniform)",
    "entries": "entries kept of the span, sinks included",
    "error": "held-out loss of what is used",
}
"""What is reported of every head."""


@dataclass(frozen=True)
class Measurement:
    """One context under one (method, budget, keep ratio)."""

    scores: TokenScores
    kept_fraction: float  # entries there are after the compression, over those there were; retained ones included
    held_out_error_before: float  # held-out loss of plain selection at the same budgets, mean over heads
    held_out_error_after: float  # of what is used
    seconds: float  # of the compression alone
    heads: dict[str, list[float]]  # per (layer, KV head), layers outermost: see `HEADS`
    trace: list[list[float]]  # at each judgement (solve.judged_after): training and held-out loss, mean over heads


class Trial:
    """One passage, computed once: its cache, its problems, and what the model says from the full cache."""

    def __init__(
        self,
        model: EvaluationModel,
        passage: Passage,
        effort: Effort,
        block_size: int,
        window: int,
        sinks: int,
    ) -> None:
        num_tokens = len(passage.context)
        self.span_blocks = max(num_tokens - window, 0) // block_size
        if self.span_blocks < 2 or sinks >= block_size:
            raise ValueError(
                f"a context of {num_tokens} tokens leaves {self.span_blocks} blocks of {block_size} tokens before its "
                f"window of {window} tokens, at least 2 are needed, each of more than {sinks} (the sink tokens)"
            )
        if num_tokens + len(passage.continuation) > model.num_positions:
            raise ValueError(
                f"{num_tokens} + {len(passage.continuation)} tokens exceed the model's {model.num_positions} positions"
            )
        self._model, self._passage = model, passage
        self._effort, self._block_size, self._window, self._sinks = effort, block_size, window, sinks
        positions, recent = sample_positions(0, num_tokens, effort.positions)
        self.recording = model.record(passage.context, positions)
        self.problems = build_problems(
            queries=self.recording.queries,
            positions=self.recording.positions,
            recent=recent,
            keys=self.recording.keys,
            values=self.recording.values,
            span=self.span_blocks * block_size,
            sinks=sinks,
            rotaries=[model.rotary] * model.num_layers,
            scale=self.recording.scale,
        )
        self._full_logits = self._logits(full_cache(self.recording))

    def plan(self, keep_ratio: float) -> PagePlan:
        """The pages that the engine would give out, all of them where it would leave the prompt as it is."""
        config = CompressionConfig(
            method="sculpt", keep_ratio=keep_ratio, min_tokens=1, sink=self._sinks, window=self._window
        )
        span = plan_span(config, len(self._passage.context), self._block_size)
        blocks = self.span_blocks if span is None else span.packed_blocks
        return PagePlan(self._block_size, self.span_blocks, blocks * self.problems.num_problems, self._sinks)

    @torch.no_grad()
    def measure(self, method: Method, budget: str, keep_ratios: Sequence[float]) -> Iterator[Measurement]:
        """Compress the context to each keep ratio, continue from it, compare.

        What serves all ratios is done once; its seconds count in each, as a single request would pay them.
        """
        begin = time.perf_counter()
        to_pages = method(self.problems, self.plan(1.0), budget, self._effort)
        prepared = time.perf_counter() - begin
        for keep_ratio in keep_ratios:
            begin = time.perf_counter()
            fitted = to_pages(self.plan(keep_ratio))
            yield self._measurement(fitted, prepared + time.perf_counter() - begin)

    def _measurement(self, fitted: Compressed, seconds: float) -> Measurement:
        cache = self.compressed_cache(fitted)
        heads = {
            "difficulty": fitted.difficulty.tolist(),
            "entries": [float(len(keys) + self._sinks) for keys in fitted.keys],
            "error": fitted.error.tolist(),
        }
        return Measurement(
            scores=self.score(cache),
            kept_fraction=cache.num_entries / (self.problems.num_problems * len(self._passage.context)),
            held_out_error_before=float(fitted.start_error.mean()),
            held_out_error_after=float(fitted.error.mean()),
            seconds=seconds,
            heads=heads,
            trace=fitted.trace.mean(-1).tolist(),
        )

    def compressed_cache(self, fitted: Compressed) -> RaggedCache:
        """Per head: its sinks, its fitted entries and the exact window."""
        span = self.span_blocks * self._block_size
        keys, values = (
            [torch.cat([held[: self._sinks], kept, held[span:]]) for held, kept in zip(whole, fitted_part, strict=True)]
            for whole, fitted_part in ((self.recording.keys, fitted.keys), (self.recording.values, fitted.values))
        )
        biases = None
        if isinstance(fitted, BiasedCompressed):
            around = self._sinks, len(self._passage.context) - span
            biases = [torch.nn.functional.pad(bias, around) for bias in fitted.biases]
        return RaggedCache(keys, values, self._model.storage, biases)

    def score(self, cache: RaggedCache) -> TokenScores:
        """What the model says after each token of the continuation, from `cache` against from the full one."""
        return compare(self._full_logits, self._logits(cache), self._passage.following)

    def _logits(self, cache: RaggedCache) -> torch.Tensor:
        return self._model.continue_from(cache, self._passage.continuation, len(self._passage.context))


def full_cache(recording: Recorder) -> RaggedCache:
    """Everything that a recorded context left."""
    return RaggedCache(list(recording.keys), list(recording.values), recording.storage)
