"""Whether the model finds in a compressed context what it finds in the full cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsculpt_vllm.evaluation.attention import RaggedCache
from kvsculpt_vllm.evaluation.harness import ONE_SPAN, Context
from kvsculpt_vllm.evaluation.methods.base import Method, OfContext
from kvsculpt_vllm.evaluation.tasks.sample import Sample


@dataclass(frozen=True)
class Found:
    """One sample of a task under one (method, budget, keep ratio)."""

    measures: list[str]  # of each question: `question.SCORE` or `question.LEAKAGE`
    scores: list[float]  # of each question's answer
    scores_full: list[float]  # the same of the answers from the full cache
    kept_fraction: float  # see `harness.Attempt`
    seconds: float  # see `harness.Attempt`
    answers: list[str]
    answers_full: list[str]

    def to_json(self) -> dict[str, Any]:
        """Make plain JSON values of the result, as a result file holds it."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Found:
        """Make a result of what `to_json` gave."""
        return cls(**plain)

    def of(self, measure: str, full: bool = False) -> list[float]:
        """Choose the scores of the questions that measure this, in their order."""
        scores = self.scores_full if full else self.scores
        return [score for score, measured in zip(scores, self.measures, strict=True) if measured == measure]

    @staticmethod
    def summary(found: Sequence[Found]) -> dict[str, Any]:
        """Compute the numbers of a row: of each measure the mean, and that of each sample and of each question."""
        row: dict[str, Any] = {"kept_fraction": float(np.mean([one.kept_fraction for one in found]))}
        for measure in dict.fromkeys(found[0].measures):
            for name, full in ((f"{measure}_full", True), (measure, False)):
                scores = np.array([one.of(measure, full) for one in found])  # (samples, questions)
                row[name] = float(scores.mean())
                row[f"{name}_per_sample"] = scores.mean(1).tolist()
                row[f"{name}_per_question"] = scores.mean(0).tolist()
        row["seconds"] = float(np.mean([one.seconds for one in found]))
        return row | {"answers": [one.answers for one in found], "answers_full": [one.answers_full for one in found]}


class Retrieval:
    """One sample of a task: its context, and the answers from the full cache."""

    def __init__(self, context: Context, sample: Sample, tokenizer: Any) -> None:
        self.context, self._sample, self._tokenizer = context, sample, tokenizer
        self._full = self._answers(context.full_cache, sample.expected)

    def measure(
        self, method: Method | OfContext, budget: str, keep_ratios: Sequence[float], segment: int = ONE_SPAN
    ) -> Iterator[Found]:
        """Compress the context to each keep ratio, in segments of `segment` tokens, ask each question of it as it is
        then, compare the answers with what was hidden.
        """
        questions = self._sample.questions
        for attempt in self.context.compress(method, budget, keep_ratios, segment):
            answers = self._answers(attempt.cache, self._full)
            texts, texts_full = (list(map(self._tokenizer.decode, tokens)) for tokens in (answers, self._full))
            yield Found(
                measures=[question.measures for question in questions],
                scores=[one.check(text) for one, text in zip(questions, texts, strict=True)],
                scores_full=[one.check(text) for one, text in zip(questions, texts_full, strict=True)],
                kept_fraction=attempt.kept_fraction,
                seconds=attempt.seconds,
                answers=texts,
                answers_full=texts_full,
            )

    def _answers(self, cache: RaggedCache, drafts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Answer every question of the same cache, which none of them changes."""
        model, sample, position = self.context.model, self._sample, self.context.num_tokens
        return [
            model.answer(cache, asked, position, question.limit, draft)
            for question, asked, draft in zip(sample.questions, sample.asked, drafts, strict=True)
        ]
