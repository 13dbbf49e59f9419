"""From all problems of a request to the entries that replace its span."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.budgets import adaptive_budgets, uniform_budgets
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Ranking, Score, by_attention, rank, selection_errors
from kvsculpt_vllm.sculpt.solve import judged_after, solve

METHODS = ("select", "select_fit", "sculpt")

POWERS = {"select": 1, "select_fit": 1, "sculpt": 2}
"""Entries are ranked by Σ_q p^power over the queries: by the attention they accumulate (KVSculpt, H2O), or by its root
mean square (Attention Matching), which keeps what one query looks at sharply before what many look at a little. Fits
make up for the latter and cannot for the former: measured, KL after mass matching halves (benchmarks/LOG.md)."""

PILOT_FRACTIONS = {
    "select": (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65),
    "select_fit": (0.06, 0.15, 0.3, 0.55),
    "sculpt": (0.06, 0.15, 0.3, 0.55),
}
"""Fractions of the span at which the pilot measures what a method loses, besides the least and the whole."""

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
    pilot_positions: int  # those of them that the pilot's fits get by with
    fit_positions: int  # those of them whose queries values and keys are fitted to and judged on
    key_steps: int  # L-BFGS steps at most


EFFORTS = {
    "fast": Effort(positions=2048, pilot_positions=128, fit_positions=384, key_steps=0),
    "balanced": Effort(positions=2048, pilot_positions=256, fit_positions=768, key_steps=5),
    "thorough": Effort(positions=4096, pilot_positions=512, fit_positions=4096, key_steps=50),
}


@dataclass(frozen=True)
class PagePlan:
    """The pages to give out for one request."""

    block_size: int  # entries a page
    span_pages: int  # pages a head's span fills now, the most it may get
    total: int  # pages to give out to all heads together
    sinks: int  # entries of each head's first page that are kept exactly and not part of the problem

    def entries(self, pages: int) -> int:
        """Entries of the problem that so many pages hold."""
        return min(pages, self.span_pages) * self.block_size - self.sinks

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
    difficulty: Tensor  # (B,) the pilot's error at the uniform budget, as budgets weigh it; 0 for uniform budgets
    trace: Tensor  # (J, 2, B) training and held-out loss at `solve.judged_after(key_steps)`, J = 0 without key steps


def compress(
    problems: Problems,
    plan: PagePlan,
    method: str,
    budget: str,
    key_steps: int = 0,
    fit_positions: int | None = None,
    pilot_positions: int = 256,
    max_elements: int | None = None,
    score: Score = by_attention,
    power: int | None = None,
) -> Compressed:
    """Give out the pages and fit every problem, on the queries of about `fit_positions` (all if None; the pilot's on
    those of about `pilot_positions`).

    Entries are ranked by `score` over all queries, attention being summed to the
    `power` (the method's own if None). All problems go through the
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
    if budget not in ("uniform", "adaptive"):
        raise ValueError(f"budget: {budget!r} given, allowed are uniform, adaptive")
    device = problems.keys.device
    ranking = rank(problems, max_elements, score, POWERS[method] if power is None else power)
    pages = uniform_budgets(num_problems, plan.total, plan.least, plan.span_pages)
    difficulty = torch.zeros(num_problems)
    if budget == "adaptive":
        grid = pilot_grid(plan, method)
        curves = pilot(problems, ranking, plan, grid, method, pilot_positions, max_elements).cpu().numpy()
        for b, count in enumerate(pages):
            difficulty[b] = np.interp(count, grid, curves[b])
        pages = adaptive_budgets(curves, grid, plan.total)

    judgements = len(judged_after(key_steps)) if method == "sculpt" and key_steps else 0
    result = Compressed(
        pages=pages,
        keys=[problems.keys[0]] * num_problems,
        values=[problems.values[0]] * num_problems,
        start_error=torch.zeros(num_problems, device=device),
        error=torch.zeros(num_problems, device=device),
        steps=torch.zeros(num_problems, dtype=torch.long, device=device),
        difficulty=difficulty.to(device),
        trace=torch.zeros(judgements, 2, num_problems, device=device),
    )
    kept = [plan.entries(count) for count in pages]
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


def pilot_grid(plan: PagePlan, method: str) -> list[int]:
    """The page counts at which the pilot measures a head's error."""
    inner = {round(fraction * plan.span_pages) for fraction in PILOT_FRACTIONS[method]}
    return sorted({plan.least, plan.span_pages} | {p for p in inner if plan.least < p < plan.span_pages})


def pilot(
    problems: Problems,
    ranking: Ranking,
    plan: PagePlan,
    grid: Sequence[int],
    method: str,
    positions: int,
    max_elements: int,
) -> Tensor:
    """What every head loses (B, G) at the page counts in `grid`, the last of which is the whole span.

    For selection that is its loss over all queries; for a method that fits, the held-out loss of a fit without key
    steps to the queries of about `positions`. Fits mend some heads and not others, so that selection's error is a
    poor guide to theirs (measured: half the KL). A loss is relative to the head's own output; times the root of the
    output's mean power it lies between what the head adds to the residual stream and how well it does by its own
    standards, and was better than the former.
    """
    norm = ranking.teacher_out.square().sum(-1).mean(-1).sqrt()
    sizes = [plan.entries(count) for count in grid]
    if method == "select":
        return selection_errors(problems, ranking, sizes, max_elements) * norm[:, None]
    rows = problems.thin_rows(positions * problems.group)
    few, ranking = problems.with_rows(rows), ranking.with_rows(rows)
    errors = []
    for size in sizes[:-1]:
        per_batch = max(1, max_elements // (size * len(rows)))
        fits = [
            solve(
                few.take(index),
                ranking.take(index),
                torch.full((len(index),), size, device=index.device),
                method,
                0,
                problems.keys.dtype,
            ).error
            for index in torch.arange(problems.num_problems, device=problems.keys.device).split(per_batch)
        ]
        errors.append(torch.cat(fits))
    return torch.stack([*errors, torch.zeros_like(norm)], dim=1) * norm[:, None]


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
