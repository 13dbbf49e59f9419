"""A sample before its length is known: what a conversation holds if it has so many units of filling."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from kvsculpt_vllm.evaluation.tasks.names import different
from kvsculpt_vllm.evaluation.tasks.question import Question

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"

Turn = tuple[str, str]  # who speaks, and what


@dataclass(frozen=True)
class Draft:
    """A conversation up to its questions, each of which ends the last turn, the user's."""

    turns: list[Turn]
    questions: list[Question]


@dataclass(frozen=True)
class Plan:
    """How a sample is made as long as it is to be: the draft of `n` units (sentences, words, documents), n <= `most`.

    More units make a longer draft, and the same number the same draft.
    """

    most: int
    draft: Callable[[int], Draft]


ENDLESS = 1 << 20
"""Units there are of what is made and not taken from a text."""


class Made:
    """The first items of a seeded source, each made once."""

    def __init__(self, source: Iterator[str]) -> None:
        self._source, self._items = source, list[str]()

    def first(self, count: int) -> list[str]:
        """Take the first `count` items."""
        self._items += islice(self._source, max(count - len(self._items), 0))
        return self._items[:count]


def made(rng: random.Random, make: Callable[[random.Random], str]) -> Made:
    """Draw different items from a source of their own, so that how many are drawn changes nothing else."""
    return Made(different(partial(make, random.Random(rng.random()))))


def hidden(facts: Sequence[str], depths: Sequence[float], sentences: Sequence[str]) -> str:
    """Put each fact between two sentences, at its depth (0: before all of them, 1: behind all)."""
    parts = list(sentences)
    for depth, fact in sorted(zip(depths, facts, strict=True), reverse=True):
        parts.insert(round(depth * len(sentences)), fact)
    return " ".join(parts)


def asked_of_text(introduction: str, text: str, questions: Sequence[Question]) -> Draft:
    """One turn: an introduction, a text, and the questions behind it."""
    return Draft([(USER, f"{introduction}\n\n{text}\n\n")], list(questions))
