"""Compress a context as the engine does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvsculpt_vllm.evaluation.attention import RaggedCache
from kvsculpt_vllm.evaluation.methods.base import Method
from kvsculpt_vllm.evaluation.methods.biased import BiasedCompressed
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.sculpt.budgets import PagePlan, span_sizes
from kvsculpt_vllm.sculpt.compress import Compressed
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.queries import build_problems, sample_positions


@dataclass(frozen=True)
class Attempt:
    """One context compressed by one method to one keep ratio."""

    fitted: Compressed
    cache: RaggedCache
    kept_fraction: float  # entries there are after the compression, over those there were; retained ones included
    seconds: float  # of the compression alone


class Context:
    """A context that was computed once: its cache, and the problems of compressing it as the engine would."""

    def __init__(
        self,
        model: EvaluationModel,
        tokens: Sequence[int],
        following: int,
        effort: Effort,
        block_size: int,
        window: int,
        sinks: int,
    ) -> None:
        """Compute `tokens`, and record their cache and queries. The model must have positions for `following` tokens
        behind them.

        Raises:
            ValueError: too few tokens for two blocks of span, or more than the model has positions for.
        """
        num_tokens = len(tokens)
        self.span_blocks = max(num_tokens - window, 0) // block_size
        if self.span_blocks < 2 or sinks >= block_size:
            raise ValueError(
                f"a context of {num_tokens} tokens leaves {self.span_blocks} blocks of {block_size} tokens before its "
                f"window of {window} tokens, at least 2 are needed, each of more than {sinks} (the sink tokens)"
            )
        if num_tokens + following > model.num_positions:
            raise ValueError(f"{num_tokens} + {following} tokens exceed the model's {model.num_positions} positions")
        self.model, self.num_tokens = model, num_tokens
        self._effort, self._block_size, self._window, self.sinks = effort, block_size, window, sinks
        positions, recent = sample_positions(0, num_tokens, effort.positions_for(model.position_bytes))
        self.recording = model.record(tokens, positions)
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

    @property
    def full_cache(self) -> RaggedCache:
        """The uncompressed cache: all keys and values of every head."""
        return RaggedCache(list(self.recording.keys), list(self.recording.values), self.recording.storage)

    def plan(self, keep_ratio: float) -> PagePlan:
        """Say how many pages the engine would give out. Where it would leave the prompt as it is, that is all pages."""
        span_blocks, packed_blocks = span_sizes(self.num_tokens, self._window, self._block_size, keep_ratio)
        blocks = min(packed_blocks, span_blocks)
        return PagePlan(self._block_size, self.span_blocks, blocks * self.problems.num_problems, self.sinks)

    @torch.no_grad()
    def compress(self, method: Method, budget: str, keep_ratios: Sequence[float]) -> Iterator[Attempt]:
        """One attempt for each keep ratio.

        What serves all ratios is done once; its seconds count in each, as a single request would pay them.
        """
        begin = time.perf_counter()
        to_pages = method(self.problems, self.plan(1.0), budget, self._effort)
        prepared = time.perf_counter() - begin
        for keep_ratio in keep_ratios:
            begin = time.perf_counter()
            fitted = to_pages(self.plan(keep_ratio))
            seconds = prepared + time.perf_counter() - begin
            cache = self.compressed_cache(fitted)
            kept_fraction = cache.num_entries / (self.problems.num_problems * self.num_tokens)
            yield Attempt(fitted, cache, kept_fraction, seconds)

    def compressed_cache(self, fitted: Compressed) -> RaggedCache:
        """Build the cache that follows a compression: per head its sinks, its fitted entries and the exact window."""
        span = self.span_blocks * self._block_size
        keys, values = (
            [torch.cat([held[: self.sinks], kept, held[span:]]) for held, kept in zip(whole, fitted_part, strict=True)]
            for whole, fitted_part in ((self.recording.keys, fitted.keys), (self.recording.values, fitted.values))
        )
        biases = None
        if isinstance(fitted, BiasedCompressed):
            around = self.sinks, self.num_tokens - span
            biases = [torch.nn.functional.pad(bias, around) for bias in fitted.biases]
        return RaggedCache(keys, values, self.model.storage, biases)
