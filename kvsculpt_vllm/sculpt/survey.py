"""Pass over a request's queries once, to find which entries matter and which heads are hard to compress.

What is found does not depend on how many pages there are to give out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.budgets import PagePlan, adaptive_budgets, grid_of, uniform_budgets
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.foretold import order_in_slices
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.memory import max_elements
from kvsculpt_vllm.sculpt.options import BUDGETS, METHODS
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Ranking, Score, by_attention, rank_in_slices, selection_errors
from kvsculpt_vllm.sculpt.slices import Slices, at_once, within
from kvsculpt_vllm.sculpt.solve import solve
from kvsculpt_vllm.sculpt.storage import Storage

POWERS = {"select": 1, "select_fit": 1, "sculpt": 2}
"""Entries are ranked by Σ_q p^power over the queries: by the attention they accumulate (KVSculpt, H2O), or by its root
mean square (Attention Matching), which keeps what one query looks at sharply before what many look at a little. Fits
make up for the latter and cannot for the former: measured, KL after mass matching halves (benchmarks/LOG.md). On some
models it is the other way round, which a calibration finds out (`LossCurves.power`)."""

PILOT_FRACTIONS = {
    "select": (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65),
    "select_fit": (0.06, 0.15, 0.3, 0.55),
    "sculpt": (0.06, 0.15, 0.3, 0.55),
}
"""Fractions of the span at which the pilot measures what a method loses, besides the least and the whole."""


@dataclass(frozen=True)
class Survey:
    """What a survey found of B heads. Budgets for any number of pages (`PagePlan.total`) follow from it without another
    pass.
    """

    ranking: Ranking
    grid: Sequence[int]  # (G,) page counts
    curves: np.ndarray | None  # (B, G) what a head loses at them, or lost elsewhere; None for uniform budgets

    def budgets(self, plan: PagePlan) -> Budgets:
        """Give out the plan's pages.

        Raises:
            ValueError: the total cannot be given out.
        """
        return give_out(plan, len(self.ranking.order), self.grid, self.curves)


@dataclass(frozen=True)
class Budgets:
    """What each of B heads gets."""

    pages: list[int]
    difficulty: Tensor  # (B,) fp32, for a report: the loss of a head at the uniform budget, 0 if budgets are uniform

    def part(self, own: slice) -> Budgets:
        """Keep the heads in `own`."""
        return Budgets(self.pages[own], self.difficulty[own])


def give_out(plan: PagePlan, num_problems: int, grid: Sequence[int], curves: np.ndarray | None) -> Budgets:
    """Give out the plan's pages to heads that lose `curves` (B, G) at the page counts in `grid`: the same number to
    each if there are no curves.

    Raises:
        ValueError: the total cannot be given out.
    """
    uniform = uniform_budgets(num_problems, plan.total, plan.least, plan.span_pages)
    if curves is None:
        return Budgets(uniform, torch.zeros(num_problems))
    difficulty = [np.interp(count, grid, curve) for count, curve in zip(uniform, curves, strict=True)]
    return Budgets(adaptive_budgets(curves, grid, plan.total), torch.tensor(difficulty, dtype=torch.float32))


def survey_in_slices(
    problems: Problems,
    plan: PagePlan,
    method: str,
    budget: str,
    effort: Effort,
    score: Score = by_attention,
    power: int | None = None,
    limit: int | None = None,
    calibration: LossCurves | None = None,
    fractions: Sequence[float] | None = None,
    answered: Tensor | None = None,
) -> Slices[Survey]:
    """Rank the entries of every problem and find how much each head loses at every budget; the plan's total plays no
    part.

    Entries are ranked by `score` over all queries. For adaptive budgets the losses come from a pilot on these problems,
    or from the `calibration` if there is one.

    Args:
        power: attention is summed over queries to this power; None means the calibration's, or the method's own
            (`POWERS`).
        limit: the largest temporary, in floats; None means the device's (`memory.max_elements`).
        fractions: fractions of the span at which the pilot measures; None means the method's own (`PILOT_FRACTIONS`).
        answered: the query rows (LongTensor, on the host) whose full answers the ranking is to know, None for all. A
            pilot needs all.

    Raises:
        ValueError: an unknown method or budget rule, no query to fit or to judge on, or a calibration of another number
            of heads.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r} given, allowed are {', '.join(METHODS)}")
    if budget not in BUDGETS:
        raise ValueError(f"budget: {budget!r} given, allowed are {', '.join(BUDGETS)}")
    if problems.held_out.all() or not problems.held_out.any():
        raise ValueError(
            f"{int(problems.held_out.sum())} of {len(problems.held_out)} queries are held out: "
            "at least one must be, and one must not"
        )
    if calibration is not None and len(calibration.losses) != problems.num_problems:
        raise ValueError(f"calibration: of {len(calibration.losses)} heads, there are {problems.num_problems}")
    limit = limit or max_elements(problems.keys.device)
    measured = None if calibration is None else calibration.power
    power = power or measured or POWERS[method]
    ranking = yield from within(fast_matmul, rank_in_slices(problems, limit, score, power, answered))
    if calibration is not None and calibration.query_maps is not None:
        ranking = yield from order_in_slices(problems, ranking, calibration.query_maps, limit)
    if budget == "uniform":
        return Survey(ranking, [], None)
    if calibration is not None:
        grid = calibration.grid(plan)
        return Survey(ranking, grid, calibration.curves(grid, plan, problems.followed))
    grid = grid_of(plan, fractions or PILOT_FRACTIONS[method])
    curves = yield from within(fast_matmul, pilot(problems, ranking, plan, grid, method, effort, limit))
    return Survey(ranking, grid, curves.cpu().numpy())


survey = at_once(survey_in_slices)


def pilot(
    problems: Problems, ranking: Ranking, plan: PagePlan, grid: Sequence[int], method: str, effort: Effort, limit: int
) -> Slices[Tensor]:
    """Measure what every head loses (B, G) at the page counts in `grid`, the last of which is the whole span.

    For the method `select` a loss is that of selection over all queries. For a method that fits it is the held-out loss
    of a fit without key steps, to the queries of about `effort.pilot_positions`. Fits mend some heads and not others,
    so that selection's loss is a poor guide to theirs (measured: half the KL).

    A head's loss is relative to the head's own output. Here it is multiplied by the root mean square of that output,
    which weighs loud heads more. That lies between what a head adds to the residual stream and how well it does by its
    own standards, and was better than either (docs/algorithm.md#budgets).
    """
    norm = ranking.teacher_out.square().sum(-1).mean(-1).sqrt()
    sizes = [plan.entries(count) for count in grid]
    if method == "select":
        losses = yield from selection_errors(problems, ranking, sizes, limit)
        return losses * norm[:, None]
    rows = problems.thin_rows(effort.pilot_positions * problems.group)
    few, ranking = problems.with_rows(rows), ranking.with_rows(rows)
    errors, storage = [], Storage(problems.keys.dtype)
    for size in sizes[:-1]:
        per_batch = max(1, limit // (size * len(rows)))
        parts = []
        for index in torch.arange(problems.num_problems, device=problems.keys.device).split(per_batch):
            sizes_of = [size] * len(index)
            done = yield from solve(few.take(index), ranking.take(index), sizes_of, method, 0, storage)
            parts.append(done.error)
            yield
        errors.append(torch.cat(parts))
    return torch.stack([*errors, torch.zeros_like(norm)], dim=1) * norm[:, None]
