"""What stands in the context is to be repeated exactly: a note, a numbered list, code with long identifiers.

The score is the share of its sentences, items or lines that the answer holds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from kvsculpt_vllm.evaluation.tasks.draft import Plan
from kvsculpt_vllm.evaluation.tasks.names import NAMES, distinct, number, two_words
from kvsculpt_vllm.evaluation.tasks.needles import in_sentences
from kvsculpt_vllm.evaluation.tasks.question import exact

SENTENCES, ITEMS = 4, 8
VERBS = ("carries", "follows", "hides", "paints", "sells", "watches")


def copy_verbatim(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """A note of some sentences that nobody would expect, word for word."""
    name, note = rng.choice(NAMES), distinct(partial(_sentence, rng), SENTENCES)
    starts = f"The note called {name} reads:"
    question = exact(f"Repeat the note called {name} word for word.", starts, note, 112, between=" ")
    return in_sentences(rng, [f"{starts} {' '.join(note)}"], [question], sentences)


def copy_list(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """A numbered list, item by item."""
    name, words = rng.choice(NAMES), distinct(partial(two_words, rng, " "), ITEMS)
    items = [f"{i}. {word}" for i, word in enumerate(words, start=1)]
    starts = f"The list called {name}:"
    question = exact(f"Repeat the list called {name}, with its numbers.", starts, items, 96, between="\n", begins="\n")
    return in_sentences(rng, ["\n".join(["", starts, *items, ""])], [question], sentences)


def copy_code(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """A function whose names are long."""
    name, first, second, sum_, product = distinct(partial(_long_name, rng), 5)
    starts = f"```python\ndef {name}("
    code = [
        f"{first}, {second}):",
        f"    {sum_} = {first} + {number(rng)}",
        f"    {product} = {second} * {sum_}",
        f"    return {product} - {first}",
    ]
    asked = f"Repeat the code of the function {name}."
    question = exact(asked, starts, code, 160, between="\n", begins="")
    return in_sentences(rng, ["\n" + starts + "\n".join([*code, "```", ""])], [question], sentences)


def _sentence(rng: random.Random) -> str:
    who, what, where, when, how = rng.sample(NAMES, 5)
    return f"The {who} {rng.choice(VERBS)} a {what} to the {where} before the {when} and the {how} come."


def _long_name(rng: random.Random) -> str:
    return "_".join(rng.sample(NAMES, 4))
