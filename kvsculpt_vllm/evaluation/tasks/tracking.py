"""Variables that take their values one from the other (RULER's multi-hop tracing, arXiv 2404.06654, section 3)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from kvsculpt_vllm.evaluation.tasks.draft import Plan
from kvsculpt_vllm.evaluation.tasks.names import distinct, number
from kvsculpt_vllm.evaluation.tasks.needles import in_sentences
from kvsculpt_vllm.evaluation.tasks.question import Question, exact

CHAIN = 4
"""Variables that take their value from another one."""


def tracking(rng: random.Random, sentences: Sequence[str]) -> Plan:
    """All variables that hold the first one's value are asked for."""
    facts, question = variables(rng)
    return in_sentences(rng, facts, [question], sentences)


def variables(rng: random.Random) -> tuple[list[str], Question]:
    """Make the assignments, in their order, and the question."""
    names = distinct(partial(_variable, rng), CHAIN + 1)
    value = number(rng)
    facts = [f"VAR {names[0]} = {value}."]
    facts += [f"VAR {later} = VAR {earlier}." for earlier, later in pairwise(names)]
    question = exact(
        f"Find all variables that are assigned the value {value} in the text, directly or through other variables.",
        f"The {len(names)} variables that are assigned the value {value} are: VAR",
        names,
        40,
        between=", VAR ",
    )
    return facts, question


def _variable(rng: random.Random) -> str:
    return "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=5))
