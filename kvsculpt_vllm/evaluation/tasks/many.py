"""Several questions about one compressed context, each asked of its own copy (the form of SCBench, arXiv 2412.10319).

A method that compresses for one question, or by luck keeps what one question asks for, shows here.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import partial

from kvsculpt_vllm.evaluation.tasks.answers import ask_employer, ask_home, lives, where_is, who_works
from kvsculpt_vllm.evaluation.tasks.draft import Plan
from kvsculpt_vllm.evaluation.tasks.names import NAMES, distinct, firm, number, person, place, two_words
from kvsculpt_vllm.evaluation.tasks.needles import (
    SEVERAL,
    ask_needle,
    ask_needles,
    ask_value,
    in_sentences,
    needle,
    pair,
)
from kvsculpt_vllm.evaluation.tasks.tracking import variables

NEEDLES = 3


def many_questions(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """Three needles, a key and its value, several values of one name, variables, where one lives, and two hops."""
    names = rng.sample(NAMES, NEEDLES + 1)
    values = distinct(partial(number, rng), NEEDLES + SEVERAL + 1)
    (*single, several), key = names, two_words(rng)
    people, towns, house = distinct(partial(person, rng), 2), distinct(partial(place, rng), 2), firm(rng)
    chain, variable_question = variables(rng)
    groups = [[needle(name, value)] for name, value in zip(single, values[:NEEDLES], strict=True)]
    groups += [
        [needle(several, value) for value in values[NEEDLES:-1]],
        [pair(key, values[-1])],
        chain,
        [lives(people[0], towns[0])],
        [who_works(people[1], house), where_is(house, towns[1])],
    ]
    questions = [ask_needle(name, value) for name, value in zip(single, values[:NEEDLES], strict=True)]
    questions += [
        ask_needles([several], values[NEEDLES:-1]),
        ask_value(key, values[-1], 16),
        variable_question,
        ask_home(people[0], towns[0]),
        ask_employer(people[1], towns[1]),
    ]
    return in_sentences(rng, _mixed(rng, groups), questions, sentences)


def _mixed(rng: random.Random, groups: Sequence[Iterable[str]]) -> list[str]:
    """All facts in one order, in which those of a group keep theirs."""
    groups = [list(group) for group in groups]
    turns = [i for i, group in enumerate(groups) for _ in group]
    rng.shuffle(turns)
    left = [iter(group) for group in groups]
    return [next(left[i]) for i in turns]
