"""Facts told in one turn of a conversation and asked for some turns later.

With `--segment` shorter than the conversation its turns are compressed in segments, each made before what follows is
known, as a server does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvsculpt_vllm.evaluation.tasks.draft import ASSISTANT, USER, Draft, Plan, Turn
from kvsculpt_vllm.evaluation.tasks.names import firm, number, place
from kvsculpt_vllm.evaluation.tasks.question import exact

TURNS = 6
"""The user's turns before the question."""

TOLD = (0, 1, 3, 5)
"""Turns in which a fact is told: six, five, three turns and one before the question."""

FACTS = (
    ("My locker has the number {}.", "Which number does my locker have?", "Your locker has the number", number),
    ("The code of my bicycle lock is {}.", "What is the code of my bicycle lock?", "The code is", number),
    ("My membership number is {}.", "What is my membership number?", "Your membership number is", number),
    ("My cat is called {}.", "What is my cat called?", "Your cat is called", place),
    ("I live in the town of {}.", "In which town do I live?", "You live in the town of", place),
    ("I work for the firm {}.", "Which firm do I work for?", "You work for the firm", firm),
)
"""How a fact is told, asked for and answered."""


def conversation(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """Facts about the user between passages to read. The questions are in the order in which the facts were told."""
    chosen = rng.sample(FACTS, len(TOLD))
    values = [make(rng) for *_, make in chosen]
    told = dict(zip(TOLD, (form.format(value) for (form, *_), value in zip(chosen, values, strict=True)), strict=True))
    questions = [exact(asked, starts, [value], 24) for (_, asked, starts, _), value in zip(chosen, values, strict=True)]

    def draft(count: int) -> Draft:
        turns: list[Turn] = []
        for i in range(TURNS):
            passage = " ".join(sentences[i * count // TURNS : (i + 1) * count // TURNS])
            fact = f"{told[i]} Please remember that. " if i in told else ""
            turns += [
                (USER, f"{fact}Here is something to read.\n\n{passage}"),
                (ASSISTANT, "Thank you, I have read it."),
            ]
        return Draft([*turns, (USER, "")], questions)

    return Plan(len(sentences), draft)
