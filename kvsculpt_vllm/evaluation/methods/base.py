"""What a method is, and what several of them do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import Compressed, fit, fitted_rows
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Ranking, Score, by_attention
from kvsculpt_vllm.sculpt.survey import Survey, survey

if TYPE_CHECKING:
    from kvsculpt_vllm.evaluation.harness import Context

ToPages = Callable[[PagePlan], Compressed]
"""Compresses the problems it was prepared for to the total of a plan, which may differ from call to call."""

Method = Callable[[Problems, PagePlan, str, Effort], ToPages]
"""Does, for problems, a budget rule and an effort, what serves any number of pages; the plan's total plays no part."""


@dataclass(frozen=True)
class OfContext:
    """A method that is made for a context: it has the model read that again, or needs to know the model."""

    of: Callable[[Context], Method]


def surveyed(name: str, score: Score = by_attention, calibration: LossCurves | None = None) -> Method:
    """Method `name` of `sculpt.compress` (select, select_fit or sculpt), by the very calls that the engine makes; the
    entries with the highest `score` come first, and adaptive budgets follow the `calibration` if there is one.
    """

    def prepare(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
        answered = None  # a pilot asks for all; fits ask for those of their own rows
        if budget != "adaptive" or calibration is not None:
            answered = fitted_rows(problems, effort)
        found = survey(problems, plan, name, budget, effort, score, calibration=calibration, answered=answered)
        return lambda plan: fit(problems, plan, found, name, effort)

    return prepare


def heads_to_fit(
    problems: Problems, found: Survey, kept: Sequence[Tensor], effort: Effort
) -> Iterator[tuple[int, Problems, Ranking]]:
    """Go through the heads of which `kept` holds less than everything: each head's number, its problem and its teacher,
    both on the queries of about `effort.fitted_on` positions.
    """
    rows = fitted_rows(problems, effort)
    fitted_on, teachers = problems.with_rows(rows), found.ranking.with_rows(rows)
    for b, keys in enumerate(kept):
        if len(keys) < problems.num_entries:
            index = torch.tensor([b], device=keys.device)
            yield b, fitted_on.take(index), teachers.take(index)
