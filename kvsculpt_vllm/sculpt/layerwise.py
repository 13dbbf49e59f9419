"""Compress a segment of a model that is too large for all its problems to be in memory: some of them at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import (
    Compressed,
    InMemory,
    Supply,
    Write,
    fit_batches_in_slices,
    fitted_rows,
    thinned,
)
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.memory import COPIES, GROUP_BYTES, layer_groups, max_elements
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.segment_source import SegmentSource
from kvsculpt_vllm.sculpt.selection import Ranking, taught_in_slices
from kvsculpt_vllm.sculpt.slices import Slices, at_once, within
from kvsculpt_vllm.sculpt.storage import Storage
from kvsculpt_vllm.sculpt.survey import give_out, survey_in_slices
from kvsculpt_vllm.sculpt.transfer import on_device


def compress_segment_in_slices(
    source: SegmentSource,
    plan: PagePlan,
    method: str,
    budget: str,
    effort: Effort,
    write: Write,
    limit: int | None = None,
    calibration: LossCurves | None = None,
    group_bytes: int | None = None,
    storage: Storage | None = None,
) -> Slices[Compressed]:
    """Compress all problems of `source`: give out the pages by the rule `budget`, fit every problem by `method`, and
    hand each batch of problems to `write` when it is done. What was written must not be used before all has been. What
    is returned tells of all problems and has no keys and values any more.

    Budgets need what every head loses, so problems are gone through twice. The first time, layer by layer, leaves the
    order of the entries and the curves. The second time goes by the budgets, so that problems of one size are fitted
    together whatever their layer: it builds only the queries that fits use, and computes again what the full cache
    answers them. Where all layers fit in memory they are built once, and everything is as in
    `compress.compress_in_slices`.

    Args:
        limit: the largest temporary, in floats; None means the device's (`memory.max_elements`).
        calibration: what adaptive budgets follow; None means a pilot on these problems.
        group_bytes: what a group of layers may take; None means the device's (`memory.GROUP_BYTES`).
        storage: what the cache makes of entries; None means that it has the dtype of the source's.

    Raises:
        ValueError: an unknown method or budget rule, a total that cannot be given out, no query to fit or judge on, or
            a calibration of another number of heads.
    """
    if calibration is not None and len(calibration.losses) != source.num_problems:
        raise ValueError(f"calibration: of {len(calibration.losses)} heads, there are {source.num_problems}")
    limit = limit or max_elements(source.device)
    group_bytes = group_bytes or GROUP_BYTES[source.device.type]
    groups = list(layer_groups(source.num_layers, source.layer_bytes, group_bytes))
    orders, curves = [], []
    ready: InMemory | None = None
    for layers in groups:
        numbers = source.problems_of(layers)
        own = slice(numbers.start, numbers.stop)
        of_group = None if calibration is None else calibration.part(own)
        problems = yield from source.of(numbers)
        if budget == "adaptive" and calibration is None:
            answered = None  # the pilot asks for all
        else:  # fits ask for those of their own rows: of these problems, or of problems that are built again
            rows = fitted_rows(problems, effort)
            answered = rows if len(groups) == 1 else rows[:0]
        found = yield from survey_in_slices(
            problems, plan, method, budget, effort, limit=limit, calibration=of_group, answered=answered
        )
        orders.append(found.ranking.order)
        curves.append(found.curves)
        grid = found.grid  # that of all groups
        if len(groups) == 1:
            ready = InMemory(*thinned(problems, found.ranking, effort))
        del problems, found  # before the next ones are built
    given = [some for some in curves if some is not None]
    budgets = give_out(plan, source.num_problems, grid, np.concatenate(given) if given else None)
    supply: Supply
    if ready is not None:
        supply, most = ready, None
    else:
        supply = again = BuiltAgain(source, torch.cat(orders), effort, limit)
        most = max(1, group_bytes // (COPIES * again.num_queries * source.head_size * 4))
    supply.storage = storage or supply.storage
    del ready, orders
    judged = yield from fit_batches_in_slices(supply, plan, budgets, method, effort, write, limit, most)
    difficulty = on_device(budgets.difficulty, source.device)
    return Compressed(**vars(judged), pages=budgets.pages, keys=[], values=[], difficulty=difficulty)


compress_segment = at_once(compress_segment_in_slices)


class BuiltAgain:
    """The supply of what `compress.thinned` would keep of a segment's problems, whose entries have this `order`."""

    def __init__(self, source: SegmentSource, order: Tensor, effort: Effort, limit: int) -> None:
        self.num_entries = source.span - source.sinks
        self._source, self._order, self._limit = source, order, limit
        self._count = effort.fitted_on(self.num_entries)
        held_out = source.held_out(self._count)
        self.num_queries, self.num_fitted_to = len(held_out), int((~held_out).sum())
        self.storage, self.device = Storage(source.keys.dtype), source.device

    def entries(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """See `compress.Supply`."""
        index, span = on_device(numbers, self.device), slice(self._source.sinks, self._source.span)
        return self._source.keys[index, span], self._source.values[index, span]

    def problems(self, numbers: list[int]) -> Slices[tuple[Problems, Ranking]]:
        """See `compress.Supply`."""
        built = yield from self._source.of(numbers, self._count)
        order = self._order[on_device(numbers, self.device)]
        ranking = yield from within(fast_matmul, taught_in_slices(built, order, self._limit))
        return built.take(slice(None)), ranking
