"""Whether the model finds in a compressed context what it finds in the full cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsculpt_vllm.evaluation.attention import RaggedCache
from kvsculpt_vllm.evaluation.harness import ONE_SPAN, Context
from kvsculpt_vllm.evaluation.methods.base import Method
from kvsculpt_vllm.evaluation.tasks import Sample, score


@dataclass(frozen=True)
class Found:
    """One sample of a task under one (method, budget, keep ratio)."""

    score: float  # share of the references in the answer
    score_full: float  # the same of the answer from the full cache
    kept_fraction: float  # see `harness.Attempt`
    seconds: float  # see `harness.Attempt`
    answer: str
    answer_full: str

    def to_json(self) -> dict[str, Any]:
        """Make plain JSON values of the result, as a result file holds it."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Found:
        """Make a result of what `to_json` gave."""
        return cls(**plain)

    @staticmethod
    def summary(found: Sequence[Found]) -> dict[str, Any]:
        """Compute the numbers of a row, over all samples."""
        names = ("kept_fraction", "score_full", "score", "seconds")
        means = {name: float(np.mean([getattr(one, name) for one in found])) for name in names}
        return means | {"score_per_sample": [one.score for one in found], "answers": [one.answer for one in found]}


class Retrieval:
    """One sample of a task: its context, and the answer from the full cache."""

    def __init__(self, context: Context, sample: Sample, tokenizer: Any) -> None:
        self.context, self._sample, self._tokenizer = context, sample, tokenizer
        self._full = self._answer(context.full_cache, ())

    def measure(
        self, method: Method, budget: str, keep_ratios: Sequence[float], segment: int = ONE_SPAN
    ) -> Iterator[Found]:
        """Compress the context to each keep ratio, in segments of `segment` tokens, ask, compare the answer with what
        was hidden.
        """
        for attempt in self.context.compress(method, budget, keep_ratios, segment):
            answer = self._answer(attempt.cache, self._full)
            text, text_full = (self._tokenizer.decode(tokens) for tokens in (answer, self._full))
            yield Found(
                score=score(text, self._sample.references),
                score_full=score(text_full, self._sample.references),
                kept_fraction=attempt.kept_fraction,
                seconds=attempt.seconds,
                answer=text,
                answer_full=text_full,
            )

    def _answer(self, cache: RaggedCache, draft: Sequence[int]) -> list[int]:
        sample = self._sample
        return self.context.model.answer(cache, sample.question, self.context.num_tokens, sample.limit, draft)
