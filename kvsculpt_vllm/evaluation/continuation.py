"""What the model says after a compressed context, compared with what it says from the full cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from kvsculpt_vllm.evaluation.attention import RaggedCache
from kvsculpt_vllm.evaluation.harness import ONE_SPAN, Attempt, Context
from kvsculpt_vllm.evaluation.methods.base import Method, OfContext
from kvsculpt_vllm.evaluation.metrics import TokenScores, compare, summarise
from kvsculpt_vllm.evaluation.texts import Passage

HEADS = {
    "difficulty": "the error at the uniform budget that adaptive budgets weigh, by pilot or calibration (0: uniform)",
    "entries": "entries kept of the span, sinks included",
    "error": "held-out loss of what is used",
}
"""What is reported of every head."""


@dataclass(frozen=True)
class Measurement:
    """One context under one (method, budget, keep ratio)."""

    scores: TokenScores
    kept_fraction: float  # see `Attempt`
    held_out_error_before: float  # held-out loss of plain selection at the same budgets, mean over heads
    held_out_error_after: float  # of what is used
    seconds: float  # see `Attempt`
    heads: dict[str, list[float]]  # per (layer, KV head), layers outermost: see `HEADS`
    trace: list[list[float]]  # at each judgement (solve.judged_after): training and held-out loss, mean over heads

    def to_json(self) -> dict[str, Any]:
        """Make plain JSON values of the measurement, as a result file holds it."""
        scores = {name: values.tolist() for name, values in asdict(self.scores).items()}
        return {name: value for name, value in vars(self).items() if name != "scores"} | {"scores": scores}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Measurement:
        """Make a measurement of what `to_json` gave."""
        scores = TokenScores(**{field.name: np.array(plain["scores"][field.name]) for field in fields(TokenScores)})
        return cls(**(plain | {"scores": scores}))

    @staticmethod
    def summary(measurements: Sequence[Measurement]) -> dict[str, Any]:
        """Compute the numbers of a row, over all contexts."""
        means = {
            name: float(np.mean([getattr(measurement, name) for measurement in measurements]))
            for name in ("kept_fraction", "seconds", "held_out_error_before", "held_out_error_after")
        }
        heads = {
            name: np.mean([measurement.heads[name] for measurement in measurements], axis=0).tolist() for name in HEADS
        }
        errors = {"held_out_error_per_context": [measurement.held_out_error_after for measurement in measurements]}
        trace = np.mean([measurement.trace for measurement in measurements], axis=0).tolist()
        return (
            summarise([measurement.scores for measurement in measurements])
            | means
            | errors
            | {"heads": heads, "trace": trace}
        )


class Trial:
    """One passage: its context, and what the model says from the full cache."""

    def __init__(self, context: Context, passage: Passage) -> None:
        self.context, self._passage = context, passage
        self._full_logits = self._logits(context.full_cache)

    def measure(
        self, method: Method | OfContext, budget: str, keep_ratios: Sequence[float], segment: int = ONE_SPAN
    ) -> Iterator[Measurement]:
        """Compress the context to each keep ratio, in segments of `segment` tokens, continue from it, compare."""
        return map(self._measurement, self.context.compress(method, budget, keep_ratios, segment))

    def score(self, cache: RaggedCache) -> TokenScores:
        """What the model says after each token of the continuation, from `cache` against from the full one."""
        return compare(self._full_logits, self._logits(cache), self._passage.following)

    def _measurement(self, attempt: Attempt) -> Measurement:
        fitted = attempt.fitted
        sinks = self.context.sinks
        heads = {
            "difficulty": fitted.difficulty.tolist(),
            "entries": [float(len(keys) + sinks) for keys in fitted.keys],
            "error": fitted.error.tolist(),
        }
        return Measurement(
            scores=self.score(attempt.cache),
            kept_fraction=attempt.kept_fraction,
            held_out_error_before=float(fitted.start_error.mean()),
            held_out_error_after=float(fitted.error.mean()),
            seconds=attempt.seconds,
            heads=heads,
            trace=fitted.trace.mean(-1).tolist(),
        )

    def _logits(self, cache: RaggedCache) -> Tensor:
        return self.context.model.continue_from(cache, self._passage.continuation, self.context.num_tokens)
