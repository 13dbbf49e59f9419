"""Work that goes on for thousands of tokens: a prompt, the right answer, and what of it can be right or wrong.

Made by a seed. What is scored is told by the prompt, or follows from it, so that one who reads it all could do
everything. Answers are as long as they are wanted, and each line of one depends on the prompt, not on luck.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import NamedTuple

import numpy as np

from kvsculpt_vllm.evaluation.tasks.names import different, two_words

Tokens = list[int]
Tokenise = Callable[[str], Tokens]
Pieces = list[tuple[str, bool]]
"""Text, and whether it is scored."""


class Work(NamedTuple):
    """A prompt and its right answer."""

    tokens: Tokens
    prompt: int  # so many of the tokens are the prompt's
    scored: np.ndarray  # (tokens,) bool: those that one who knows what is before them can tell


class Task(NamedTuple):
    """How a task's prompt begins, what it tells line by line, how it ends, and the answer's lines for ever."""

    begins: str
    tells: Callable[[int, str, int], str]  # a line's number, name and value
    ends: str
    answers: Callable[[random.Random, list[tuple[str, int]]], Iterator[Pieces]]


def _copied(_: random.Random, told: list[tuple[str, int]]) -> Iterator[Pieces]:
    for number, (name, value) in cycle(enumerate(told, start=1)):
        yield [(f"{number}.", False), (f" {name}:", True), (f" {value}", True), ("\n", False)]


def _added(rng: random.Random, told: list[tuple[str, int]]) -> Iterator[Pieces]:
    while True:
        (one, price), (other, more) = rng.sample(told, 2)
        yield [
            (f"{one}", False),
            (f" {price}", True),
            (f" + {other}", False),
            (f" {more}", True),
            (" =", False),
            (f" {price + more}", True),
            ("\n", False),
        ]


TASKS = {
    "list": Task(
        "A register of names and numbers:\n",
        lambda number, name, value: f"{number}. {name}: {value}\n",
        "The same register again, line by line and without a mistake:\n",
        _copied,
    ),
    "sums": Task(
        "What things cost:\n",
        lambda _, name, value: f"{name} {value}\n",
        "What two things cost, and what they cost together:\n",
        _added,
    ),
}


def work(name: str, tokenise: Tokenise, prompt: int, answer: int, seed: int, prefix: Tokens) -> Work:
    """Make the `seed`-th sample of the task `name`, of about `prompt` and `answer` tokens, behind the tokens `prefix`
    that every text has. `tokenise` turns text into tokens.
    """
    rng, task = random.Random(f"{name}/{seed}"), TASKS[name]
    names, told = different(lambda: two_words(rng)), list[tuple[str, int]]()
    tokens, ends = [*prefix, *tokenise(task.begins)], tokenise(task.ends)
    while len(tokens) + len(ends) < prompt:
        told.append((next(names), rng.randrange(11, 100)))
        tokens += tokenise(task.tells(len(told), *told[-1]))
    tokens += ends
    number, scored = len(tokens), [False] * len(tokens)
    for line in task.answers(rng, told):
        for text, counts in line:
            piece = tokenise(text)
            tokens += piece
            scored += [counts] * len(piece)
        if len(tokens) >= number + answer:
            break
    return Work(tokens, number, np.array(scored))
