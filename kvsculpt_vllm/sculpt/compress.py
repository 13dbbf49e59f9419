"""From all problems of a request to the entries that replace its span."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.budgets import adaptive_budgets, uniform_budgets
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Score, by_attention, rank
from kvsculpt_vllm.sculpt.solve import judged_after, solve

METHODS = ("select", "select_fit", "sculpt")

PILOT_FRACTIONS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65)
"""Fractions of the span at which the pilot measures selection, besides the least and the whole."""


MAX_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Floats in the largest temporary. On a CPU 16 MiB: larger ones glibc maps and unmaps each time, and the page faults
cost more than the arithmetic (measured: 4 to 10 times). On a GPU 1 GiB: enough to fill it."""


@dataclass(frozen=True)
class Effort:
    """How much work a request's compression may be.

    Ranking entries and giving out budgets is one pass over the queries, and gains most from many of them (measured:
    see benchmarks/LOG.md); a fit passes over its queries many times and gets by with fewer.
    """

    positions: int  # of the prompt whose queries rank entries and give out budgets
    fit_positions: int  # those of them whose queries values and keys are fitted to and judged on
    key_steps: int  # L-BFGS steps at most


EFFORTS = {
    "fast": Effort(positions=1024, fit_positions=384, key_steps=0),
    "balanced": Effort(positions=2048, fit_positions=1024, key_steps=10),
    "thorough": Effort(positions=4096, fit_positions=4096, key_steps=60),
}


@dataclass(frozen=True)
class PagePlan:
    """The pages to give out for one request."""

    block_size: int  # entries a page
    span_pages: int  # pages a head's span fills now, the most it may get
    total: int  # pages to give out to all heads together
    sinks: int  # entries of each head's first page that are kept exactly and not part of the problem

    @property
    def least(self) -> int:
        """The fewest pages that hold the sinks and one more entry."""
        return math.ceil((self.sinks + 1) / self.block_size)


@dataclass
class Compressed:
    """What replaces the span: `keys[b]` and `values[b]` are (entries of problem b, D), sinks not included."""

    pages: list[int]
    keys: list[Tensor]
    values: list[Tensor]
    start_error: Tensor  # (B,) held-out loss of plain selection at these budgets
    error: Tensor  # (B,) held-out loss of what is returned
    steps: Tensor  # (B,) key steps taken
    difficulty: Tensor  # (B,) what plain selection would lose at the uniform budget, in absolute units (the pilot's)
    trace: Tensor  # (J, 2, B) training and held-out loss after `solve.judged_after(key_steps)` key steps


def compress(
    problems: Problems,
    plan: PagePlan,
    method: str,
    budget: str,
    key_steps: int,
    fit_positions: int | None = None,
    max_elements: int | None = None,
    score: Score = by_attention,
    power: int = 1,
) -> Compressed:
    """Give out the pages and fit every problem, on the queries of about `fit_positions` (all if None).

    Entries are ranked by `score` over all queries, attention being summed to the `power`. All problems go through the
    solver in as few batches as `max_elements` (the largest matrix of weights, in floats) allows, sorted by size so that
    little padding is computed.

    Raises:
        ValueError: an unknown method or budget rule, a total that cannot be given out, or no query to fit or judge on.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r} given, allowed are {', '.join(METHODS)}")
    if problems.held_out.all() or not problems.held_out.any():
        raise ValueError(
            f"{int(problems.held_out.sum())} of {len(problems.held_out)} queries are held out: "
            "at least one must be, and one must not"
        )
    num_problems, num_queries = problems.queries.shape[:2]
    if max_elements is None:
        max_elements = MAX_ELEMENTS[problems.keys.device.type]
    grid = pilot_grid(plan)
    sizes = [min(pages * plan.block_size - plan.sinks, problems.num_entries) for pages in grid]
    device = problems.keys.device
    ranking = rank(problems, sizes, max_elements, score, power)
    curves = ranking.errors.cpu().numpy()
    pages = uniform_budgets(num_problems, plan.total, plan.least, plan.span_pages)
    difficulty = [np.interp(count, grid, curve) for count, curve in zip(pages, curves, strict=True)]
    if budget == "adaptive":
        pages = adaptive_budgets(curves, grid, plan.total)
    elif budget != "uniform":
        raise ValueError(f"budget: {budget!r} given, allowed are uniform, adaptive")

    result = Compressed(
        pages=pages,
        keys=[problems.keys[0]] * num_problems,
        values=[problems.values[0]] * num_problems,
        start_error=torch.zeros(num_problems, device=device),
        error=torch.zeros(num_problems, device=device),
        steps=torch.zeros(num_problems, dtype=torch.long, device=device),
        difficulty=torch.tensor(difficulty, dtype=torch.float32, device=device),
        trace=torch.zeros(len(judged_after(key_steps)), 2, num_problems, device=device),
    )
    kept = [min(p * plan.block_size - plan.sinks, problems.num_entries) for p in pages]
    rows = problems.thin_rows(num_queries if fit_positions is None else fit_positions * problems.group)
    fitted_on, ranking = problems.with_rows(rows), ranking.with_rows(rows)
    for group in _groups(kept, problems.num_entries, max_elements // len(rows)):
        if kept[group[0]] == problems.num_entries:  # everything fits: copied, nothing to fit
            for b in group:
                result.keys[b], result.values[b] = problems.keys[b], problems.values[b]
            continue
        index = torch.tensor(group, device=device)
        group_sizes = torch.tensor([kept[b] for b in group], device=device)
        fit = solve(fitted_on.take(index), ranking.take(index), group_sizes, method, key_steps, problems.keys.dtype)
        for row, b in enumerate(group):
            result.keys[b] = fit.keys[row, : kept[b]].to(problems.keys.dtype)
            result.values[b] = fit.values[row, : kept[b]].to(problems.values.dtype)
        result.start_error[index], result.error[index], result.steps[index] = fit.start_error, fit.error, fit.steps
        result.trace[..., index] = fit.trace
    return result


def pilot_grid(plan: PagePlan) -> list[int]:
    """The page counts at which the pilot measures a head's error."""
    inner = {round(fraction * plan.span_pages) for fraction in PILOT_FRACTIONS}
    return sorted({plan.least, plan.span_pages} | {p for p in inner if plan.least < p < plan.span_pages})


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
