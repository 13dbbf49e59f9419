"""Words that are there more often than others (RULER's aggregation, arXiv 2404.06654, section 3)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from itertools import chain

from kvsculpt_vllm.evaluation.tasks.draft import ENDLESS, Draft, Made, Plan, asked_of_text
from kvsculpt_vllm.evaluation.tasks.names import WORDS, different, two_words
from kvsculpt_vllm.evaluation.tasks.question import exact

COMMON, TIMES = 10, 10
"""Common words, and how many times as often as another word each is there, if there is room: RULER's 30 against 3."""

FREQUENT, EXPONENT = 3, 2.0
"""The most frequent words that are asked for, and how fast frequencies fall by rank: RULER's zeta distribution."""

FEWEST_COMMON, FEWEST_FREQUENT = 4 * COMMON, 100
"""Words that a text has at least: with fewer, those that are asked for would not be ahead of the others."""

ZETA = sum(rank**-EXPONENT for rank in range(1, 100_000))


def common_words(rng: random.Random, _: Sequence[str]) -> Plan:
    """A numbered list, half of it ten words over and over, which are asked for."""
    words, order = _words(rng), rng.random()

    def draft(count: int) -> Draft:
        total = count + FEWEST_COMMON
        times = total // (2 * COMMON)
        times_others = max(times // TIMES, 1)
        drawn = words.first(COMMON + total)
        listed = drawn[:COMMON] * times
        listed += [drawn[COMMON + i // times_others] for i in range(total - len(listed))]
        random.Random(order).shuffle(listed)
        question = exact(
            f"What are the {COMMON} most common words in the list?",
            f"The {COMMON} most common words in the list are:",
            drawn[:COMMON],
            96,
        )
        text = " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1))
        introduction = (
            "Some words are often in the following numbered list, the others are not. Memorise the common ones."
        )
        return asked_of_text(introduction, text, [question])

    return Plan(ENDLESS, draft)


def frequent_words(rng: random.Random, _: Sequence[str]) -> Plan:
    """A text of words whose frequencies fall with the square of their rank; the first three are asked for."""
    words, order = _words(rng), rng.random()

    def draft(count: int) -> Draft:
        total = count + FEWEST_FREQUENT
        drawn, text = words.first(total), list[str]()
        for rank, word in enumerate(drawn, start=1):
            text += [word] * max(round(total * rank**-EXPONENT / ZETA), 1)
            if len(text) >= total:
                break
        text = text[:total]
        random.Random(order).shuffle(text)
        question = exact(
            f"What are the {FREQUENT} most frequent words in the text?",
            f"The {FREQUENT} most frequent words in the text are:",
            drawn[:FREQUENT],
            50,
        )
        introduction = "Count how often each word of the following coded text is there."
        return asked_of_text(introduction, " ".join(text), [question])

    return Plan(ENDLESS, draft)


def _words(rng: random.Random) -> Made:
    """Draw plain words first, and where a long text needs more of them two as one."""
    plain = rng.sample(WORDS, len(WORDS))
    return Made(chain(plain, different(partial(two_words, random.Random(rng.random()), ""))))
