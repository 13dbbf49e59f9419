"""What is asked about a context, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SCORE, LEAKAGE = "score", "leakage"
"""What an answer measures: 1 is all that was asked for, or all that should have stayed secret."""


@dataclass(frozen=True)
class Holds:
    """The share of the references that an answer holds, whatever their case (RULER's string_match_all)."""

    references: tuple[str, ...]

    def __call__(self, answer: str) -> float:
        """Score an answer between 0 and 1."""
        return score(answer, self.references)


@dataclass(frozen=True)
class Question:
    """One question, asked from a copy of the cache, so that no question knows of another."""

    asked: str
    answer_starts: str  # the model goes on from here; only what it adds is scored
    check: Callable[[str], float]
    limit: int  # tokens an answer may have
    measures: str = SCORE
    expected: str = ""
    """A right answer, where there is one: answers are computed faster as far as they are like it."""


def exact(
    asked: str, answer_starts: str, references: Sequence[str], limit: int, between: str = ", ", begins: str = " "
) -> Question:
    """Ask for strings that an answer must hold, which `begins` with this and has that `between` them."""
    expected = begins + between.join(references)
    return Question(asked, answer_starts, Holds(tuple(references)), limit, expected=expected)


def score(answer: str, references: Sequence[str]) -> float:
    """Count which share of the references the answer holds (RULER's string_match_all)."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)
