"""From problems to the entries that replace their span."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.memory import max_elements
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Ranking
from kvsculpt_vllm.sculpt.slices import Slices, at_once, within
from kvsculpt_vllm.sculpt.solve import judged_after, solve
from kvsculpt_vllm.sculpt.survey import Budgets, Survey, survey_in_slices
from kvsculpt_vllm.sculpt.transfer import on_device


@dataclass
class Compressed:
    """What replaces the span: `keys[b]` and `values[b]` are (entries of problem b, D), sinks not included."""

    pages: list[int]
    keys: list[Tensor]
    values: list[Tensor]
    start_error: Tensor  # (B,) held-out loss of plain selection at these budgets
    error: Tensor  # (B,) held-out loss of what is returned
    steps: Tensor  # (B,) key steps taken
    failed_solves: Tensor  # (B,) systems of the values that could not be solved, so that the values stayed
    difficulty: Tensor  # (B,) the error at the uniform budget, as adaptive budgets weigh it; 0 for uniform ones
    trace: Tensor  # (J, 2, B) training and held-out loss at `solve.judged_after(key_steps)`, J = 0 without key steps


def compress_in_slices(
    problems: Problems,
    plan: PagePlan,
    method: str,
    budget: str,
    effort: Effort,
    limit: int | None = None,
    calibration: LossCurves | None = None,
) -> Slices[Compressed]:
    """Compress problems that are all in memory: give out the pages by the rule `budget`, and fit every problem by
    `method`. For a model whose problems do not fit there is `layerwise.compress_segment_in_slices`.

    Args:
        limit: the largest temporary, in floats; None means the device's (`memory.max_elements`).
        calibration: what adaptive budgets follow; None means a pilot on these problems.

    Raises:
        ValueError: an unknown method or budget rule, a total that cannot be given out, or no query to fit or judge on.
    """
    found = yield from survey_in_slices(problems, plan, method, budget, effort, limit=limit, calibration=calibration)
    return (yield from fit_in_slices(problems, plan, found, method, effort, limit))


compress = at_once(compress_in_slices)


def fit_in_slices(
    problems: Problems, plan: PagePlan, found: Survey, method: str, effort: Effort, limit: int | None = None
) -> Slices[Compressed]:
    """Fit every problem to the queries of about `effort.fit_positions`, with the budgets that the survey `found` gives
    it.

    Raises:
        ValueError: the plan's total cannot be given out.
    """
    budgets = found.budgets(plan)
    fitted_on, ranking = thinned(problems, found.ranking, effort)
    return (yield from fit_thinned_in_slices(fitted_on, plan, ranking, budgets, method, effort, limit))


fit = at_once(fit_in_slices)


def thinned(problems: Problems, ranking: Ranking, effort: Effort) -> tuple[Problems, Ranking]:
    """Keep only the query rows of about `effort.fit_positions`."""
    rows = problems.thin_rows(effort.fit_positions * problems.group)
    if len(rows) == len(problems.held_out):  # all of them: a copy would only take memory
        return problems, ranking
    return problems.with_rows(rows), ranking.with_rows(rows)


def fit_thinned_in_slices(
    problems: Problems,
    plan: PagePlan,
    ranking: Ranking,
    budgets: Budgets,
    method: str,
    effort: Effort,
    limit: int | None = None,
) -> Slices[Compressed]:
    """Fit every problem to all queries that are given, and to as many pages as `budgets` gives it.

    All problems go through the solver in as few batches as `limit` (the largest temporary, in floats) allows, sorted by
    size so that little padding is computed.
    """
    num_problems, device = problems.num_problems, problems.keys.device
    limit = limit or max_elements(device)
    key_steps = effort.key_steps if method == "sculpt" else 0
    result = Compressed(
        pages=budgets.pages,
        keys=[problems.keys[0]] * num_problems,
        values=[problems.values[0]] * num_problems,
        start_error=torch.zeros(num_problems, device=device),
        error=torch.zeros(num_problems, device=device),
        steps=torch.zeros(num_problems, dtype=torch.long, device=device),
        failed_solves=torch.zeros(num_problems, dtype=torch.long, device=device),
        difficulty=budgets.difficulty.to(device),
        trace=torch.zeros(len(judged_after(key_steps)) if key_steps else 0, 2, num_problems, device=device),
    )
    kept = [plan.entries(count) for count in budgets.pages]
    for group in _groups(kept, problems.num_entries, limit // len(problems.held_out)):
        if kept[group[0]] == problems.num_entries:  # everything fits: copied, nothing to fit
            for b in group:
                result.keys[b], result.values[b] = problems.keys[b], problems.values[b]
            continue
        index = on_device(group, device)
        fitting = solve(
            problems.take(index),
            ranking.take(index),
            [kept[b] for b in group],
            method,
            key_steps,
            problems.keys.dtype,
            both_starts=True,
        )
        done = yield from within(fast_matmul, fitting)
        for row, b in enumerate(group):
            result.keys[b] = done.keys[row, : kept[b]].to(problems.keys.dtype)
            result.values[b] = done.values[row, : kept[b]].to(problems.values.dtype)
        result.start_error[index], result.error[index] = done.start_error, done.error
        result.steps[index], result.failed_solves[index] = done.steps, done.failed_solves
        result.trace[..., index] = done.trace
        yield
    return result


def _groups(sizes: list[int], whole: int, max_entries: int) -> Iterator[list[int]]:
    """Problem indices in groups of similar size (padding at most a quarter), whole spans apart.

    `max_entries` bounds a group's entries, padding included, except that one problem always fits.
    """
    group: list[int] = []
    for b in sorted(range(len(sizes)), key=lambda i: (sizes[i], i)):
        if group and (
            (len(group) + 1) * sizes[b] > max_entries
            or sizes[b] > 1.25 * sizes[group[0]]
            or (sizes[b] == whole) != (sizes[group[0]] == whole)
        ):
            yield group
            group = []
        group.append(b)
    if group:
        yield group
