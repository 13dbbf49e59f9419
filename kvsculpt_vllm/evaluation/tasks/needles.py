"""Needles in a haystack: RULER's retrieval tasks (arXiv 2404.06654, section 3 and table 5)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from kvsculpt_vllm.evaluation.tasks.draft import ENDLESS, Draft, Plan, asked_of_text, hidden, made
from kvsculpt_vllm.evaluation.tasks.names import NAMES, distinct, identifier, number, two_words
from kvsculpt_vllm.evaluation.tasks.question import Question, exact

INTRODUCTION = "Some facts are hidden in the following text. Memorise them, you will be asked about them afterwards."

NOISE = ("The sea is quiet.", "The wind has gone to sleep.", "One boat lies at the pier.", "Nobody is in a hurry.")
"""Says nothing, over and over (RULER's first single needle)."""

KEY_VALUE_LINES = 8
SEVERAL = 4
"""Values of one key, or keys that are asked for at once."""


def niah(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """A needle in a haystack: one number."""
    name, value = rng.choice(NAMES), number(rng)
    return in_sentences(rng, [needle(name, value)], [ask_needle(name, value)], sentences)


def niah_noise(rng: random.Random, _: Sequence[str]) -> Plan:
    """A needle in a haystack that repeats itself."""
    name, value, depth = rng.choice(NAMES), number(rng), rng.random()

    def draft(count: int) -> Draft:
        sentences = [NOISE[i % len(NOISE)] for i in range(count)]
        text = hidden([needle(name, value)], [depth], sentences)
        return asked_of_text(INTRODUCTION, text, [ask_needle(name, value)])

    return Plan(ENDLESS, draft)


def niah_uuid(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """A needle in a haystack that is long and means nothing."""
    name, value = rng.choice(NAMES), identifier(rng)
    fact = f"The special magic UUID for {name} is {value}."
    question = exact(
        f"What is the special magic UUID for {name} mentioned in the text?",
        f"The special magic UUID for {name} is",
        [value],
        48,
    )
    return in_sentences(rng, [fact], [question], sentences)


def multikey(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """Lines of keys and values, one of which is asked for: the others distract."""
    keys = distinct(partial(two_words, rng), KEY_VALUE_LINES)
    values = distinct(partial(number, rng), KEY_VALUE_LINES)
    asked = rng.randrange(len(keys))
    facts = [pair(key, value) for key, value in zip(keys, values, strict=True)]
    return in_sentences(rng, facts, [ask_value(keys[asked], values[asked], 16)], sentences)


def multikey_full(rng: random.Random, _: Sequence[str]) -> Plan:
    """Nothing but lines of keys and values."""
    return _only_pairs(rng, two_words, number, 16)


def multikey_uuid(rng: random.Random, _: Sequence[str]) -> Plan:
    """Nothing but lines whose keys and values are identifiers."""
    return _only_pairs(rng, identifier, identifier, 48)


def multivalue(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """Several numbers of one name, all asked for."""
    name, values = rng.choice(NAMES), distinct(partial(number, rng), SEVERAL)
    return in_sentences(rng, [needle(name, value) for value in values], [ask_needles([name], values)], sentences)


def multiquery(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """Numbers of several names, all asked for at once."""
    names, values = rng.sample(NAMES, SEVERAL), distinct(partial(number, rng), SEVERAL)
    facts = [needle(name, value) for name, value in zip(names, values, strict=True)]
    return in_sentences(rng, facts, [ask_needles(names, values)], sentences)


def in_sentences(
    rng: random.Random, facts: Sequence[str], questions: Sequence[Question], sentences: Sequence[str]
) -> Plan:
    """Hide facts in this order, at any depths, and ask afterwards."""
    depths = sorted(rng.random() for _ in facts)

    def draft(count: int) -> Draft:
        return asked_of_text(INTRODUCTION, hidden(facts, depths, sentences[:count]), questions)

    return Plan(len(sentences), draft)


def needle(name: str, value: str) -> str:
    """Say the number of a name."""
    return f"The special magic number for {name} is {value}."


def ask_needle(name: str, value: str) -> Question:
    """Ask for the number of a name."""
    return exact(
        f"What is the special magic number for {name} mentioned in the text?",
        f"The special magic number for {name} mentioned in the text is",
        [value],
        16,
    )


def ask_needles(names: Sequence[str], values: Sequence[str]) -> Question:
    """Ask for all numbers of some names."""
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return exact(
        f"What are all the special magic numbers for {listed} mentioned in the text?",
        f"The {len(values)} special magic numbers for {listed} mentioned in the text are",
        values,
        64,
    )


def pair(key: str, value: str) -> str:
    """Say the value of a key."""
    return f"The value of the key {key} is {value}."


def ask_value(key: str, value: str, limit: int) -> Question:
    """Ask for the value of a key."""
    return exact(
        f"What is the value of the key {key} mentioned in the text?",
        f"The value of the key {key} mentioned in the text is",
        [value],
        limit,
    )


def _only_pairs(
    rng: random.Random, key: Callable[[random.Random], str], value: Callable[[random.Random], str], limit: int
) -> Plan:
    """Lines of pairs alone. Which one is asked for is at the same depth however many there are."""
    depth = rng.random()
    keys, values = made(rng, key), made(rng, value)

    def draft(count: int) -> Draft:
        pairs = list(zip(keys.first(count + 1), values.first(count + 1), strict=True))
        asked = pairs[int(depth * len(pairs))]
        return asked_of_text(INTRODUCTION, "\n".join(pair(*each) for each in pairs), [ask_value(*asked, limit)])

    return Plan(ENDLESS, draft)
