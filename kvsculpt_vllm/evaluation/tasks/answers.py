"""Questions over documents of which most distract (RULER's question answering, arXiv 2404.06654, section 3).

RULER takes SQuAD and HotpotQA. Here people, firms and towns are made up, so that nothing is downloaded and no model
has read them before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvsculpt_vllm.evaluation.tasks.draft import Draft, Plan, asked_of_text, made
from kvsculpt_vllm.evaluation.tasks.names import firm, person, place
from kvsculpt_vllm.evaluation.tasks.question import Question, exact

INTRODUCTION = "Read the following documents. You will be asked about one of them afterwards."

FILLING = 2
"""Sentences of the text behind each document's fact."""

TRADES = (
    *("baker", "bookbinder", "brewer", "carpenter", "clockmaker", "cooper", "glassblower", "goldsmith", "locksmith"),
    *("mason", "miller", "painter", "potter", "printer", "roofer", "saddler", "shoemaker", "tailor", "weaver"),
)


def qa(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """A document a person; where one of them lives is asked for."""
    people, homes, depth = made(rng, person), made(rng, place), rng.random()

    def draft(count: int) -> Draft:
        pairs = list(zip(*(source.first(1 + count // FILLING) for source in (people, homes)), strict=True))
        facts = [f"{name} is a {random.Random(name).choice(TRADES)}. {lives(name, home)}" for name, home in pairs]
        asked = pairs[int(depth * len(pairs))]
        return asked_of_text(INTRODUCTION, _documents(facts, sentences[:count]), [ask_home(*asked)])

    return Plan(len(sentences), draft)


def qa_two_hops(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """Documents about people and about firms, in any order; where the firm is that someone works for is asked for."""
    people, firms, towns = made(rng, person), made(rng, firm), made(rng, place)
    depth, order = rng.random(), rng.random()

    def draft(count: int) -> Draft:
        total = 2 + count // FILLING
        pairs = (total + 1) // 2  # the last firm's document may be missing, and is not the one asked for
        persons, houses, places = (source.first(pairs) for source in (people, firms, towns))
        facts = [who_works(*each) for each in zip(persons, houses, strict=True)]
        facts += [where_is(*each) for each in zip(houses, places, strict=True)]
        del facts[total:]
        random.Random(order).shuffle(facts)
        asked = int(depth * (total - pairs))
        question = ask_employer(persons[asked], places[asked])
        return asked_of_text(INTRODUCTION, _documents(facts, sentences[:count]), [question])

    return Plan(len(sentences), draft)


def ask_home(name: str, town: str) -> Question:
    """Ask where a person lives."""
    return exact(f"In which town does {name} live?", f"{name} lives in the town of", [town], 32)


def ask_employer(name: str, town: str) -> Question:
    """Ask where the firm is that a person works for."""
    asked = f"In which town is the firm that {name} works for?"
    return exact(asked, f"The firm that {name} works for is in the town of", [town], 32)


def lives(name: str, town: str) -> str:
    """Say where a person lives."""
    return f"{name} lives in the town of {town}."


def who_works(name: str, house: str) -> str:
    """Say who works for a firm."""
    return f"{name} works for the firm {house}."


def where_is(house: str, town: str) -> str:
    """Say where a firm is."""
    return f"The firm {house} is in the town of {town}."


def _documents(facts: Sequence[str], sentences: Sequence[str]) -> str:
    """Number the documents: in each a fact, and some sentences that say nothing of it."""
    parts = [[fact, *sentences[i * FILLING : (i + 1) * FILLING]] for i, fact in enumerate(facts)]
    return "\n\n".join(f"Document {i}: {' '.join(part)}" for i, part in enumerate(parts, start=1))
