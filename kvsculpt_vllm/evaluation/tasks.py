"""Retrieval tasks after RULER (arXiv 2404.06654), made offline: something is hidden in a text and then asked for.

The question comes after the compression, as the next turn of a conversation would: no method can know what will be
asked.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

INTRODUCTION = "Some facts are hidden in the following text. Memorise them, you will be asked about them afterwards."

_WORDS = (
    "amber anchor apple arrow autumn badger barrel beacon birch bishop blanket bottle branch bridge bronze bucket "
    "butter button cabin candle canyon carpet castle cherry chimney circle cobalt comet copper coral cotton cradle "
    "crystal curtain daisy desert diamond dolphin dragon eagle ember falcon feather fiddle forest fountain garden "
    "ginger glacier granite hammer harbor hazel helmet honey island ivory jacket jasmine jungle kettle ladder lagoon "
    "lantern laurel lemon lily linen lizard magnet maple marble meadow mirror mitten monkey needle nickel oasis olive "
    "orchid otter oyster paddle palace panther parrot pearl pebble pepper piano pillow pirate planet pocket pumpkin "
    "quartz rabbit raven ribbon river rocket saddle saffron sailor satin shadow silver sparrow spider stable summer "
    "temple thistle thunder tiger timber tulip tunnel turtle valley velvet violin walnut willow window winter zebra"
)

NAMES = _WORDS.split()
"""What things are called."""

KEY_VALUE_LINES = 8
CHAIN = 4
"""Variables that take their value from another one."""


@dataclass(frozen=True)
class Task:
    """What is hidden, and what is asked."""

    facts: list[str]  # hidden in this order, each between two sentences
    question: str
    answer_starts: str  # the model goes on from here
    references: list[str]  # strings an answer must hold
    limit: int  # tokens an answer may have


def niah(rng: random.Random) -> Task:
    """A needle in a haystack: one number."""
    name, number = rng.choice(NAMES), _number(rng)
    return Task(
        [f"The special magic number for {name} is {number}."],
        f"What is the special magic number for {name} mentioned in the text?",
        f"The special magic number for {name} mentioned in the text is",
        [number],
        16,
    )


def multikey(rng: random.Random) -> Task:
    """Lines of keys and values, one of which is asked for: the others distract."""
    keys = ["-".join(rng.sample(NAMES, 2)) for _ in range(KEY_VALUE_LINES)]
    numbers = [_number(rng) for _ in keys]
    asked = rng.randrange(len(keys))
    return Task(
        [f"The value of the key {key} is {number}." for key, number in zip(keys, numbers, strict=True)],
        f"What is the value of the key {keys[asked]} mentioned in the text?",
        f"The value of the key {keys[asked]} mentioned in the text is",
        [numbers[asked]],
        16,
    )


def tracking(rng: random.Random) -> Task:
    """Variables that take their value one from the other: all that hold the first one's value are asked for."""
    names = ["".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=5)) for _ in range(CHAIN + 1)]
    value = _number(rng)
    facts = [f"VAR {names[0]} = {value}."]
    facts += [f"VAR {later} = VAR {earlier}." for earlier, later in pairwise(names)]
    return Task(
        facts,
        f"Find all variables that are assigned the value {value} in the text, directly or through other variables.",
        f"The {len(names)} variables that are assigned the value {value} are: VAR",
        names,
        40,
    )


TASKS: dict[str, Callable[[random.Random], Task]] = {"niah": niah, "multikey": multikey, "tracking": tracking}


@dataclass(frozen=True)
class Sample:
    """A task in tokens."""

    context: list[int]  # what becomes the cache
    question: list[int]  # the question and how the answer starts
    references: list[str]
    limit: int


def samples(
    name: str, text: str, tokenizer: PreTrainedTokenizerBase, context: int, count: int, seed: int
) -> list[Sample]:
    """`count` samples of task `name`, each hidden in another part of the text; `context` is their most tokens.

    Raises:
        ValueError: the text is too short for them.
    """
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    room = len(sentences) // count
    return [
        _sample(TASKS[name](rng), sentences[i * room : (i + 1) * room], tokenizer, context, rng)
        for i in range(count)
        for rng in [random.Random(f"{seed}/{name}/{i}")]
    ]


def _sample(
    task: Task, sentences: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: int, rng: random.Random
) -> Sample:
    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    depths = sorted(rng.random() for _ in task.facts)

    def rendered(number: int) -> tuple[list[int], str]:
        """The prompt over the first `number` sentences, up to where the question starts, and the rest."""
        parts, hidden = list(sentences[:number]), zip(depths, task.facts, strict=True)
        for depth, fact in sorted(hidden, reverse=True):
            parts.insert(round(depth * number), fact)
        before, after = _chat(tokenizer, f"{INTRODUCTION}\n\n{' '.join(parts)}\n\n", task.question)
        return tokens(before), after

    few, many = 0, len(sentences)  # the most sentences that fit, by bisection
    if len(rendered(many)[0]) <= context or len(rendered(few)[0]) > context:
        raise ValueError(
            f"--context: {context} tokens are too few for the task, or the text has too few for so many contexts: "
            f"each has {len(sentences)} sentences"
        )
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if len(rendered(middle)[0]) <= context else (few, middle)
    before, after = rendered(few)
    return Sample(before, tokens(after + task.answer_starts), task.references, task.limit)


def _chat(tokenizer: PreTrainedTokenizerBase, text: str, question: str) -> tuple[str, str]:
    """The conversation so far, and what follows: the question and the start of the answer's turn."""
    if tokenizer.chat_template is None:
        return text, f"{question}\n"
    mark = "\x00"
    conversation = [{"role": "user", "content": f"{text}{mark}{question}"}]
    before, _, after = tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True
    ).partition(mark)
    return before, after


def score(answer: str, references: Sequence[str]) -> float:
    """The share of the references that the answer holds (RULER's string_match_all)."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))
