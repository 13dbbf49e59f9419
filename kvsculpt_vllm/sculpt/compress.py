"""From all problems of a request to the entries that replace its span."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.budgets import adaptive_budgets, uniform_budgets
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import rank
from kvsculpt_vllm.sculpt.solve import solve

METHODS = ("select", "select_fit", "sculpt")

PILOT_FRACTIONS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65)
"""Fractions of the span at which the pilot measures selection, besides the least and the whole."""


@dataclass(frozen=True)
class Effort:
    """How much work a request's compression may be."""

    query_rows: int  # queries a problem is fitted and judged on (positions times query heads of the group)
    key_steps: int  # L-BFGS steps at most


EFFORTS = {
    "fast": Effort(query_rows=512, key_steps=10),
    "balanced": Effort(query_rows=1024, key_steps=30),
    "thorough": Effort(query_rows=3072, key_steps=100),
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


def compress(
    problems: Problems,
    plan: PagePlan,
    method: str,
    budget: str,
    key_steps: int,
    max_elements: int = 1 << 26,
) -> Compressed:
    """Give out the pages and fit every problem.

    All problems go through the solver in as few batches as `max_elements` (the largest score matrix, in floats)
    allows, sorted by size so that little padding is computed.

    Raises:
        ValueError: an unknown method or budget rule.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r} given, allowed are {', '.join(METHODS)}")
    num_problems, num_queries = problems.queries.shape[:2]
    grid = _pilot_grid(plan)
    sizes = [min(pages * plan.block_size - plan.sinks, problems.num_entries) for pages in grid]
    order = torch.empty(num_problems, problems.num_entries, dtype=torch.long, device=problems.keys.device)
    errors = torch.empty(num_problems, len(grid), device=problems.keys.device)
    per_batch = max(1, max_elements // (num_queries * problems.num_entries))
    for index in torch.arange(num_problems, device=problems.keys.device).split(per_batch):
        ranking = rank(problems.take(index), sizes)
        order[index], errors[index] = ranking.order, ranking.errors
    if budget == "adaptive":
        pages = adaptive_budgets(errors.cpu().numpy(), grid, plan.total)
    elif budget == "uniform":
        pages = uniform_budgets(num_problems, plan.total, plan.span_pages)
    else:
        raise ValueError(f"budget: {budget!r} given, allowed are uniform, adaptive")

    result = Compressed(
        pages=pages,
        keys=[problems.keys[0]] * num_problems,
        values=[problems.values[0]] * num_problems,
        start_error=errors.new_zeros(num_problems),
        error=errors.new_zeros(num_problems),
        steps=torch.zeros(num_problems, dtype=torch.long, device=errors.device),
    )
    kept = [min(p * plan.block_size - plan.sinks, problems.num_entries) for p in pages]
    for group in _groups(kept, problems.num_entries, per_batch):
        if kept[group[0]] == problems.num_entries:  # everything fits: copied, nothing to fit
            for b in group:
                result.keys[b], result.values[b] = problems.keys[b], problems.values[b]
            continue
        index = torch.tensor(group, device=errors.device)
        group_sizes = torch.tensor([kept[b] for b in group], device=errors.device)
        fit = solve(problems.take(index), order[index], group_sizes, method, key_steps, problems.keys.dtype)
        for row, b in enumerate(group):
            result.keys[b] = fit.keys[row, : kept[b]].to(problems.keys.dtype)
            result.values[b] = fit.values[row, : kept[b]].to(problems.values.dtype)
        result.start_error[index], result.error[index], result.steps[index] = fit.start_error, fit.error, fit.steps
    return result


def _pilot_grid(plan: PagePlan) -> list[int]:
    inner = {round(fraction * plan.span_pages) for fraction in PILOT_FRACTIONS}
    return sorted({plan.least, plan.span_pages} | {p for p in inner if plan.least < p < plan.span_pages})


def _groups(sizes: list[int], whole: int, most: int) -> Iterator[list[int]]:
    """Problem indices in groups of similar size (padding at most a quarter), whole spans apart, `most` a group."""
    group: list[int] = []
    for b in sorted(range(len(sizes)), key=lambda i: (sizes[i], i)):
        if group and (
            len(group) == most or sizes[b] > 1.25 * sizes[group[0]] or (sizes[b] == whole) != (sizes[group[0]] == whole)
        ):
            yield group
            group = []
        group.append(b)
    if group:
        yield group
