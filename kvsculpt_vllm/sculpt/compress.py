"""From problems to the entries that replace their span."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.memory import PADDING, max_elements
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Ranking
from kvsculpt_vllm.sculpt.slices import Slices, at_once, within
from kvsculpt_vllm.sculpt.solve import judged_after, solve
from kvsculpt_vllm.sculpt.storage import Storage
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


@dataclass
class Judged:
    """What a fit knows of B problems besides their entries; as in `Compressed`."""

    start_error: Tensor
    error: Tensor
    steps: Tensor
    failed_solves: Tensor
    trace: Tensor


@dataclass
class FittedBatch:
    """The entries of some problems that were fitted together."""

    numbers: list[int]  # ascending: which of all problems they are
    entries: list[int]  # how many each has
    keys: Tensor  # (b, m, D) of `Storage.result_dtype`, padded to the longest
    values: Tensor  # (b, m, D)


Write = Callable[[FittedBatch, list[int]], None]
"""Takes what replaces the problems of a batch: called as ``write(fitted, pages)`` for one batch after the other, with
the pages of all problems. What it raises ends the compression."""


class Supply(Protocol):
    """Gives problems to be fitted, some at a time."""

    num_fitted_to: int  # query rows of each problem that are not held out
    num_entries: int  # of each problem's span
    storage: Storage  # of all problems
    device: torch.device

    def entries(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Give the keys and values (b, n, D) of some problems, as they were read from the cache."""

    def problems(self, numbers: list[int]) -> Slices[tuple[Problems, Ranking]]:
        """Give some problems, every tensor in float32, and their rankings."""


@dataclass
class InMemory:
    """The supply where all problems are in memory."""

    every: Problems
    ranking: Ranking

    def __post_init__(self) -> None:
        self.num_fitted_to, self.num_entries = int((~self.every.held_out).sum()), self.every.num_entries
        self.storage, self.device = Storage(self.every.keys.dtype), self.every.keys.device

    def entries(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """See `Supply`."""
        index = on_device(numbers, self.device)
        return self.every.keys[index], self.every.values[index]

    def problems(self, numbers: list[int]) -> Slices[tuple[Problems, Ranking]]:
        """See `Supply`."""
        yield from ()
        index = on_device(numbers, self.device)
        return self.every.take(index), self.ranking.take(index)


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
    problems: Problems,
    plan: PagePlan,
    found: Survey,
    method: str,
    effort: Effort,
    limit: int | None = None,
    storage: Storage | None = None,
) -> Slices[Compressed]:
    """Fit every problem to the queries of about `effort.fitted_on` positions, with the budgets that the survey `found`
    gives it. What is fitted will be in `storage`, and is judged so; None means one of the problems' own dtype.

    Raises:
        ValueError: the plan's total cannot be given out.
    """
    budgets = found.budgets(plan)
    supply = InMemory(*thinned(problems, found.ranking, effort))
    supply.storage = storage or supply.storage
    keys, values = [problems.keys[0]] * problems.num_problems, [problems.values[0]] * problems.num_problems

    def write(fitted: FittedBatch, _pages: list[int]) -> None:
        for row, (b, count) in enumerate(zip(fitted.numbers, fitted.entries, strict=True)):
            keys[b], values[b] = fitted.keys[row, :count], fitted.values[row, :count]

    judged = yield from fit_batches_in_slices(supply, plan, budgets, method, effort, write, limit)
    difficulty = on_device(budgets.difficulty, problems.keys.device)
    return Compressed(**vars(judged), pages=budgets.pages, keys=keys, values=values, difficulty=difficulty)


fit = at_once(fit_in_slices)


def fitted_rows(problems: Problems, effort: Effort) -> Tensor:
    """Choose the query rows (LongTensor, on the host) that a fit uses: those of about `effort.fitted_on` positions."""
    return problems.thin_rows(effort.fitted_on(problems.num_entries) * problems.group)


def thinned(problems: Problems, ranking: Ranking, effort: Effort) -> tuple[Problems, Ranking]:
    """Keep only the query rows that a fit uses. The `ranking` has answers of all rows, or of these."""
    rows = fitted_rows(problems, effort)
    if len(rows) == len(problems.held_out):  # all of them: a copy would only take memory
        return problems, ranking
    is_thin = ranking.teacher_lse.shape[1] == len(rows)
    return problems.with_rows(rows), ranking if is_thin else ranking.with_rows(rows)


def fit_batches_in_slices(
    supply: Supply,
    plan: PagePlan,
    budgets: Budgets,
    method: str,
    effort: Effort,
    write: Write,
    limit: int | None = None,
    most: int | None = None,
) -> Slices[Judged]:
    """Fit every problem to the queries that `supply` gives, and to as many pages as `budgets` gives it, and hand batch
    after batch to `write`.

    All problems go through the solver in as few batches as `limit` (the largest temporary, in floats) and `most` (the
    problems of a batch, None for any number) allow, sorted by size so that little padding is computed.
    """
    device = supply.device
    limit = limit or max_elements(device)
    key_steps = effort.key_steps if method == "sculpt" else 0
    kept = [plan.entries(count) for count in budgets.pages]
    # As many entries as with all of an effort's positions: what key steps keep does not shrink with the queries.
    largest = limit * effort.fitted_on(supply.num_entries) // (effort.fit_positions * supply.num_fitted_to)
    groups = _groups(kept, supply.num_entries, largest, most or len(kept), PADDING[device.type])
    order, judged = [], []
    for numbers in map(sorted, groups):
        sizes = [kept[b] for b in numbers]
        order += numbers
        storage = supply.storage.take(numbers)
        if sizes[0] == supply.num_entries:  # everything fits: copied, nothing to fit
            keys, values = supply.entries(numbers)
            keys, values = storage.coarse_keys(keys), storage.coarse_values(values)
            nothing = torch.zeros(len(numbers), device=device)
            none = torch.zeros(len(numbers), dtype=torch.long, device=device)
            trace = nothing.expand(len(judged_after(key_steps)) if key_steps else 0, 2, -1)
            judged.append(Judged(nothing, nothing, none, none, trace))
        else:
            problems, ranking = yield from supply.problems(numbers)
            fitting = solve(problems, ranking, sizes, method, key_steps, storage, both_starts=effort.plain_start)
            del problems, ranking  # the solver lets go of them when it can
            done = yield from within(fast_matmul, fitting)
            keys, values = done.keys.to(storage.result_dtype), done.values.to(storage.result_dtype)
            judged.append(Judged(done.start_error, done.error, done.steps, done.failed_solves, done.trace))
            del fitting, done
        write(FittedBatch(numbers, sizes, keys, values), budgets.pages)
        del keys, values
        yield
    back = on_device(sorted(range(len(order)), key=order.__getitem__), device)
    return Judged(
        **{name: torch.cat([getattr(part, name) for part in judged], dim=-1)[..., back] for name in vars(judged[0])}
    )


def _groups(sizes: list[int], whole: int, max_entries: int, most: int, padding: float) -> Iterator[list[int]]:
    """Problem indices in groups of at most `most` of similar size (the largest at most `padding` times the smallest),
    whole spans apart.

    `max_entries` bounds a group's entries, padding included, except that one problem always fits.
    """
    group: list[int] = []
    for b in sorted(range(len(sizes)), key=lambda i: (sizes[i], i)):
        if group and (
            (len(group) + 1) * sizes[b] > max_entries
            or len(group) == most
            or sizes[b] > padding * sizes[group[0]]
            or (sizes[b] == whole) != (sizes[group[0]] == whole)
        ):
            yield group
            group = []
        group.append(b)
    if group:
        yield group
