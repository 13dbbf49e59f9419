"""Compress a context as the engine does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvsculpt_vllm.evaluation.attention import RaggedCache
from kvsculpt_vllm.evaluation.chain import Chain, joined
from kvsculpt_vllm.evaluation.methods.base import Method, OfContext
from kvsculpt_vllm.evaluation.methods.biased import BiasedCompressed
from kvsculpt_vllm.evaluation.methods.fp8 import InFP8
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.sculpt.budgets import PagePlan, span_sizes
from kvsculpt_vllm.sculpt.chain import Piece, pieces
from kvsculpt_vllm.sculpt.compress import Compressed
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.queries import build_problems, sample_positions

ONE_SPAN = 0
"""As the length of a segment: a context is one span, however long it is."""


def is_one_span(num_tokens: int, window: int, block_size: int, segment: int) -> bool:
    """Say whether a context of `num_tokens` is compressed at once where segments have `segment` tokens."""
    return segment == ONE_SPAN or len(list(pieces(num_tokens, window, block_size, 1.0, segment))) == 1


@dataclass(frozen=True)
class Attempt:
    """One context compressed by one method to one keep ratio."""

    fitted: Compressed
    cache: RaggedCache
    kept_fraction: float  # entries there are after the compression, over those there were; retained ones included
    seconds: float  # of the compression alone


class Context:
    """A context that was computed once: its cache, and the problems of compressing it as one span, as the engine would.
    A chain of segments computes it anew, each from those before it.
    """

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
        self.model, self.num_tokens, self.tokens = model, num_tokens, tokens
        self._effort, self._block_size, self._window, self.sinks = effort, block_size, window, sinks
        self._end = self.span_blocks * block_size + window
        positions, self._recent = sample_positions(0, self._end, effort.positions_for(model.position_bytes))
        self.recording = model.record(tokens, positions)

    @cached_property
    def problems(self) -> Problems:
        """The problems of one span. The last tokens, less than a block, that are behind its window play no part."""
        return build_problems(
            queries=self.recording.queries,
            positions=self.recording.positions,
            recent=self._recent,
            keys=self.recording.keys[:, : self._end],
            values=self.recording.values[:, : self._end],
            span=self.span_blocks * self._block_size,
            sinks=self.sinks,
            rotaries=self.model.rotaries,
            scale=self.recording.scale,
            soft_cap=self.recording.soft_cap,
            sink_logits=self.recording.sink_logits,
        )

    @property
    def full_cache(self) -> RaggedCache:
        """The uncompressed cache: all keys and values of every head."""
        recording = self.recording
        return RaggedCache(list(recording.keys), list(recording.values), recording.storage, windows=recording.windows)

    def plan(self, keep_ratio: float) -> PagePlan:
        """Say how many pages the engine would give out. Where it would leave the prompt as it is, that is all pages."""
        span_blocks, packed_blocks = span_sizes(self.num_tokens, self._window, self._block_size, keep_ratio)
        blocks = min(packed_blocks, span_blocks)
        return PagePlan(self._block_size, self.span_blocks, blocks * self.problems.num_problems, self.sinks)

    @torch.no_grad()
    def compress(
        self, method: Method | OfContext, budget: str, keep_ratios: Sequence[float], segment: int = ONE_SPAN
    ) -> Iterator[Attempt]:
        """One attempt for each keep ratio, in segments of `segment` tokens.

        What serves all ratios of one span is done once; its seconds count in each, as a single request would pay them.

        Raises:
            NotImplementedError: a method that is made for a context as a whole cannot make segments.
        """
        if not is_one_span(self.num_tokens, self._window, self._block_size, segment):
            if isinstance(method, OfContext):
                raise NotImplementedError("a method that is made for a context takes it at once: --segment 0")
            yield from (self._chained(method, budget, self.pieces(ratio, segment)) for ratio in keep_ratios)
            return
        begin = time.perf_counter()
        if isinstance(method, OfContext):
            method = method.of(self)
        to_pages = method(self.problems, self.plan(1.0), budget, self._effort)
        prepared = time.perf_counter() - begin
        for keep_ratio in keep_ratios:
            begin = time.perf_counter()
            fitted = to_pages(self.plan(keep_ratio))
            seconds = prepared + time.perf_counter() - begin
            yield self._attempt(fitted, self.compressed_cache(fitted), seconds)

    def pieces(self, keep_ratio: float, segment: int) -> list[Piece]:
        """Say where the engine would cut the context."""
        return list(pieces(self.num_tokens, self._window, self._block_size, keep_ratio, segment))

    def _chained(self, method: Method, budget: str, cuts: Sequence[Piece]) -> Attempt:
        chain = Chain(self.model, self.tokens, self._effort, self._block_size, self._window, self.sinks)
        made = chain.make(cuts, method, budget)
        return self._attempt(joined(made.segments), made.cache, made.seconds)

    def _attempt(self, fitted: Compressed, cache: RaggedCache, seconds: float) -> Attempt:
        return Attempt(fitted, cache, cache.num_entries / (len(fitted.keys) * self.num_tokens), seconds)

    def compressed_cache(self, fitted: Compressed) -> RaggedCache:
        """Build the cache that follows a compression: per head its sinks, its fitted entries and the exact window."""
        span = self.span_blocks * self._block_size
        around_keys, around_values = self.recording.keys, self.recording.values
        if isinstance(fitted, InFP8):
            around_keys, around_values = fitted.forms[0].rounded(around_keys), fitted.forms[1].rounded(around_values)
        keys, values = (
            [torch.cat([held[: self.sinks], kept, held[span:]]) for held, kept in zip(whole, fitted_part, strict=True)]
            for whole, fitted_part in ((around_keys, fitted.keys), (around_values, fitted.values))
        )
        biases = None
        if isinstance(fitted, BiasedCompressed):
            around = self.sinks, self.num_tokens - span
            biases = [torch.nn.functional.pad(bias, around) for bias in fitted.biases]
        return RaggedCache(keys, values, self.model.storage, biases, self.recording.windows)
