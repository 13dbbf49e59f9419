"""Compress a context segment by segment while it is computed, as the engine does with a long prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvsculpt_vllm.evaluation.attention import RaggedCache
from kvsculpt_vllm.evaluation.methods.base import Method
from kvsculpt_vllm.evaluation.methods.biased import BiasedCompressed
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.evaluation.windows import Kept
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.chain import Piece
from kvsculpt_vllm.sculpt.compress import Compressed
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.problem import Earlier, Problems
from kvsculpt_vllm.sculpt.queries import build_problems, sample_positions


@dataclass(frozen=True)
class Made:
    """A context of which a chain of segments was made."""

    segments: list[Compressed]
    cache: RaggedCache  # the segments' entries, then the exact tail, which was computed from them
    seconds: float  # of compressing the segments alone


@dataclass(frozen=True)
class Exact:
    """What was computed of n consecutive tokens."""

    queries: Tensor  # (L, n, heads, D), in the cache's dtype, as the others
    keys: Tensor  # (L·H, n, D)
    values: Tensor  # (L·H, n, D)
    scale: float
    soft_cap: float | None
    sink_logits: Tensor | None  # (L, heads)

    def followed_by(self, other: Exact) -> Exact:
        """Append what was computed of the tokens behind these."""
        return replace(
            self,
            queries=torch.cat([self.queries, other.queries], 1),
            keys=torch.cat([self.keys, other.keys], 1),
            values=torch.cat([self.values, other.values], 1),
        )

    def without(self, count: int) -> Exact:
        """Drop the first `count` tokens."""
        # Copies: a view would hold the memory of a whole segment.
        queries, keys, values = (part[:, count:].clone() for part in (self.queries, self.keys, self.values))
        return replace(self, queries=queries, keys=keys, values=values)


class Chain:
    """A context that is being computed: its first tokens have become segments, the others are exact so far."""

    def __init__(
        self, model: EvaluationModel, tokens: Sequence[int], effort: Effort, block_size: int, window: int, sinks: int
    ) -> None:
        self._model, self._tokens, self._effort = model, tokens, effort
        self._block_size, self._window, self._sinks = block_size, window, sinks
        self._earlier: Earlier | None = None  # what the segments hold, per problem
        self._first = 0  # tokens that they stand for
        self._exact: Exact | None = None  # the computed tokens behind them
        self._windows: Sequence[Kept] = ()  # what the layers that see a window kept of the last of these

    def make(self, pieces: Sequence[Piece], method: Method, budget: str) -> Made:
        """Compute the context up to a window behind a piece, put a segment in the piece's place, go on.

        So what follows a segment is computed from it, and not from the exact cache.
        """
        segments: list[Compressed] = []
        seconds = 0.0
        for piece in pieces:
            segment, took = self.add(piece, method, budget)
            segments.append(segment)
            seconds += took
        self.compute(len(self._tokens))
        return Made(segments, self.cache, seconds)

    def add(self, piece: Piece, method: Method, budget: str) -> tuple[Compressed, float]:
        """Compute the context up to a window behind a piece and put a segment in the piece's place. No more than that
        may have been computed before.

        Returns:
            The segment, and the seconds of compressing alone.
        """
        end = piece.end * self._block_size
        self.compute(end + self._window)
        problems, sinks = self._problems(end - self._first, piece.followed), self._sinks_here
        plan = PagePlan(self._block_size, piece.blocks, piece.packed_blocks * problems.num_problems, sinks)
        begin = time.perf_counter()
        segment = method(problems, plan, budget, self._effort)(plan)
        seconds = time.perf_counter() - begin
        self._replace(end, segment)
        return segment, seconds

    @property
    def _sinks_here(self) -> int:
        """Sink tokens of the segment that is next: only a context's beginning has them."""
        return 0 if self._first else self._sinks

    @property
    def cache(self) -> RaggedCache:
        """What the tokens computed so far left."""
        assert self._exact is not None
        keys, values = list(self._exact.keys), list(self._exact.values)
        if self._earlier is not None:
            keys, values = (
                [torch.cat(pair) for pair in zip(made, exact, strict=True)]
                for made, exact in ((self._earlier.keys, keys), (self._earlier.values, values))
            )
        return RaggedCache(keys, values, self._model.storage, windows=self._windows)

    def compute(self, end: int) -> None:
        """Compute all tokens before `end` that are not computed yet."""
        begin = self._first + (0 if self._exact is None else self._exact.keys.shape[1])
        if begin == end:
            return
        past = None if self._exact is None else self.cache
        recorded = self._model.record(self._tokens[begin:end], torch.arange(begin, end), begin, past)
        self._windows = recorded.windows
        new = Exact(
            recorded.queries,
            recorded.keys,
            recorded.values,
            recorded.scale,
            recorded.soft_cap,
            recorded.sink_logits,
        )
        self._exact = new if self._exact is None else self._exact.followed_by(new)

    def _problems(self, span: int, followed: bool) -> Problems:
        """Build the problems of the next segment, of `span` tokens; the window behind it has been computed, no more."""
        assert self._exact is not None
        count = self._effort.positions_for(self._model.position_bytes)
        positions, recent = sample_positions(self._first, self._first + span + self._window, count)
        return build_problems(
            queries=self._exact.queries[:, positions.to(self._model.device) - self._first],
            positions=positions.to(self._model.device),
            recent=recent,
            keys=self._exact.keys,
            values=self._exact.values,
            span=span,
            sinks=self._sinks_here,
            rotaries=self._model.rotaries,
            scale=self._exact.scale,
            soft_cap=self._exact.soft_cap,
            sink_logits=self._exact.sink_logits,
            first=self._first,
            earlier=self._earlier,
            followed=followed,
        )

    def _replace(self, end: int, segment: Compressed) -> None:
        """Put `segment` in the place of the exact tokens before `end`.

        Raises:
            NotImplementedError: its entries have biases, which no later segment would know of.
        """
        if isinstance(segment, BiasedCompressed):
            raise NotImplementedError("a method that stores biases cannot make segments: measure it with --segment 0")
        assert self._exact is not None
        keys, values = (
            [torch.cat([exact[: self._sinks_here], fitted]) for exact, fitted in zip(whole, part, strict=True)]
            for whole, part in ((self._exact.keys, segment.keys), (self._exact.values, segment.values))
        )
        if self._earlier is not None:
            keys = [torch.cat(pair) for pair in zip(self._earlier.keys, keys, strict=True)]
            values = [torch.cat(pair) for pair in zip(self._earlier.values, values, strict=True)]
        self._earlier, self._exact = Earlier(keys, values), self._exact.without(end - self._first)
        self._first = end


def joined(segments: Sequence[Compressed]) -> Compressed:
    """Describe a chain as one compression: per head all entries, pages and steps, and the segments' mean errors."""

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(segment, name) for segment in segments]).mean(0)

    return Compressed(
        pages=[sum(pages) for pages in zip(*(segment.pages for segment in segments), strict=True)],
        keys=[torch.cat(keys) for keys in zip(*(segment.keys for segment in segments), strict=True)],
        values=[torch.cat(values) for values in zip(*(segment.values for segment in segments), strict=True)],
        start_error=mean("start_error"),
        error=mean("error"),
        steps=torch.stack([segment.steps for segment in segments]).sum(0),
        failed_solves=torch.stack([segment.failed_solves for segment in segments]).sum(0),
        difficulty=mean("difficulty"),
        trace=mean("trace"),
    )
