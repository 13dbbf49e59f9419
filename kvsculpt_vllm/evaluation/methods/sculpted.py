"""The methods of this package, by the very calls that the engine makes."""

from __future__ import annotations

from kvsculpt_vllm.evaluation.methods.base import Method, ToPages
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import fit
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.survey import survey


def sculpted(name: str) -> Method:
    """Method `name` of `sculpt.compress` (select, select_fit or sculpt)."""

    def prepare(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
        found = survey(problems, plan, name, budget, effort)
        return lambda plan: fit(problems, plan, found, name, effort)

    return prepare
