"""What a method is, and those that only choose entries."""

from __future__ import annotations

from collections.abc import Callable

from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import Compressed, fit
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Score
from kvsculpt_vllm.sculpt.survey import survey

ToPages = Callable[[PagePlan], Compressed]
"""Compresses the problems it was prepared for to the total of a plan, which may differ from call to call."""

Method = Callable[[Problems, PagePlan, str, Effort], ToPages]
"""Does, for problems, a budget rule and an effort, what serves any number of pages; the plan's total plays no part."""


def selection(score: Score) -> Method:
    """Keep the entries with the highest score, exactly."""

    def prepare(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
        found = survey(problems, plan, "select", budget, effort, score)
        return lambda plan: fit(problems, plan, found, "select", effort)

    return prepare
