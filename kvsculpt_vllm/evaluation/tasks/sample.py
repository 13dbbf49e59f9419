"""Samples of a task in tokens, as long as was asked for."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from kvsculpt_vllm.evaluation.tasks.draft import Draft, Plan
from kvsculpt_vllm.evaluation.tasks.question import Question

if TYPE_CHECKING:  # benchmarks/quality.py only asks for the names of tasks
    from transformers import PreTrainedTokenizerBase

Tokens = list[int]

Maker = Callable[[random.Random, Sequence[str]], Plan]
"""Makes a sample's plan by a seed and the sentences of its part of the text."""


@dataclass(frozen=True)
class Sample:
    """One context and the questions about it."""

    context: Tokens  # what becomes the cache
    questions: list[Question]
    asked: list[Tokens]  # of each question: itself, and how the answer starts
    expected: list[Tokens]  # a right answer, or nothing

    @property
    def following(self) -> int:
        """The most tokens that come behind the context."""
        return max(len(asked) + one.limit for asked, one in zip(self.asked, self.questions, strict=True))


def samples(
    name: str,
    make: Maker,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    count: int,
    seed: int,
    prefix: Sequence[int] = (),
) -> list[Sample]:
    """`count` samples of task `name`, each in another part of the text; `context` is their most tokens. Without a chat
    template, which would say it, a sample begins with the `prefix` that every text has.

    Raises:
        ValueError: the text is too short for them, or the context for the task.
    """
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    room = len(sentences) // count
    return [
        _sample(
            name,
            make(random.Random(f"{seed}/{name}/{i}"), sentences[i * room : (i + 1) * room]),
            tokenizer,
            context,
            [] if tokenizer.chat_template else list(prefix),
        )
        for i in range(count)
    ]


def _sample(name: str, plan: Plan, tokenizer: PreTrainedTokenizerBase, context: int, prefix: Tokens) -> Sample:
    def tokens(text: str) -> Tokens:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def before(count: int) -> Tokens:
        draft = plan.draft(count)
        return prefix + tokens(_chat(tokenizer, draft, draft.questions[0].asked)[0])

    few, many = 0, 1  # the most units that fit, by doubling and bisection
    if (least := len(before(few))) > context:
        raise ValueError(f"--context: {context} tokens are too few for the task {name}, it takes at least {least}")
    while len(before(many)) <= context:
        if many == plan.most:
            raise ValueError(
                f"--context: the text has too few tokens for so many contexts of {context} tokens: each has "
                f"{plan.most} sentences"
            )
        few, many = many, min(2 * many, plan.most)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if len(before(middle)) <= context else (few, middle)
    draft = plan.draft(few)
    afters = [_chat(tokenizer, draft, question.asked)[1] + question.answer_starts for question in draft.questions]
    expected = [tokens(question.expected) if question.expected else [] for question in draft.questions]
    return Sample(before(few), draft.questions, [tokens(after) for after in afters], expected)


def _chat(tokenizer: PreTrainedTokenizerBase, draft: Draft, question: str) -> tuple[str, str]:
    """The conversation so far, and what follows: the question and the start of the answer's turn.

    Raises:
        ValueError: the chat template refuses the conversation.
    """
    if tokenizer.chat_template is None:
        return "\n\n".join(text for _, text in draft.turns), f"{question}\n"
    mark = "\x00"
    *earlier, (role, last) = draft.turns
    conversation = [{"role": who, "content": text} for who, text in [*earlier, (role, f"{last}{mark}{question}")]]
    try:
        rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"--tasks: the model's chat template refuses the conversation ({error})") from error
    before, _, after = rendered.partition(mark)
    return before, after
