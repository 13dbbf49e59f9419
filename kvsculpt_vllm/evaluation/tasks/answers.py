"""Questions over documents of which most distract (RULER's question answering, arXiv 2404.06654, section 3).

RULER takes SQuAD and HotpotQA. Here people, firms and towns are made up, so that nothing is downloaded and no model
has read them before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvsculpt_vllm.evaluation.tasks.draft import ENDLESS, Draft, Plan, asked_of_text, made
from kvsculpt_vllm.evaluation.tasks.names import firm, person, place
from kvsculpt_vllm.evaluation.tasks.question import Question, exact

INTRODUCTION = "Read the following documents. You will be asked about one of them afterwards."

TRADES = (
    *("baker", "bookbinder", "brewer", "carpenter", "clockmaker", "cooper", "glassblower", "goldsmith", "locksmith"),
    *("mason", "miller", "painter", "potter", "printer", "roofer", "saddler", "shoemaker", "tailor", "weaver"),
)


def qa(rng: random.Random, _: Sequence[str]) -> Plan:
    """A document a person, with two towns; where one of them lives is asked for."""
    people, births, homes, depth = made(rng, person), made(rng, place), made(rng, place), rng.random()

    def draft(count: int) -> Draft:
        each = list(zip(*(source.first(count + 1) for source in (people, births, homes)), strict=True))
        documents = [
            f"{name} was born in the town of {birth}. {name} is a {random.Random(name).choice(TRADES)} and lives in "
            f"the town of {home}."
            for name, birth, home in each
        ]
        name, _, home = each[int(depth * len(each))]
        return asked_of_text(INTRODUCTION, _numbered(documents), [ask_home(name, home)])

    return Plan(ENDLESS, draft)


def qa_two_hops(rng: random.Random, _: Sequence[str]) -> Plan:
    """Documents about people and about firms, in any order; where the firm is that someone works for is asked for."""
    people, firms, towns = made(rng, person), made(rng, firm), made(rng, place)
    depth, order = rng.random(), rng.random()

    def draft(count: int) -> Draft:
        pairs = (count + 3) // 2  # the last firm's document may be missing, and is not the one asked for
        persons, houses, places = (source.first(pairs) for source in (people, firms, towns))
        documents = [who_works(*each) for each in zip(persons, houses, strict=True)]
        documents += [where_is(*each) for each in zip(houses, places, strict=True)]
        del documents[count + 2 :]
        random.Random(order).shuffle(documents)
        asked = int(depth * (count + 2 - pairs))
        question = ask_employer(persons[asked], places[asked])
        return asked_of_text(INTRODUCTION, _numbered(documents), [question])

    return Plan(ENDLESS, draft)


def ask_home(name: str, town: str) -> Question:
    """Ask where a person lives."""
    return exact(f"In which town does {name} live?", f"{name} lives in the town of", [town], 32)


def ask_employer(name: str, town: str) -> Question:
    """Ask where the firm is that a person works for."""
    asked = f"In which town is the firm that {name} works for?"
    return exact(asked, f"The firm that {name} works for is in the town of", [town], 32)


def who_works(name: str, house: str) -> str:
    """Say who works for a firm."""
    return f"{name} works for the firm {house}."


def where_is(house: str, town: str) -> str:
    """Say where a firm is."""
    return f"The firm {house} is in the town of {town}."


def _numbered(documents: Sequence[str]) -> str:
    return "\n\n".join(f"Document {i}: {document}" for i, document in enumerate(documents, start=1))
