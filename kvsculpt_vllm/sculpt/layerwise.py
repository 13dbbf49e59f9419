"""Compress a segment of a model that is too large for all its problems to be in memory: some layers at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import Compressed, fit_thinned_in_slices, thinned
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.memory import GROUP_BYTES, layer_groups, max_elements
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.segment_source import SegmentSource
from kvsculpt_vllm.sculpt.selection import Ranking, rank_in_slices
from kvsculpt_vllm.sculpt.slices import Slices, at_once, within
from kvsculpt_vllm.sculpt.survey import give_out, survey_in_slices

Write = Callable[[Compressed, int, list[int]], None]
"""Takes what replaces the problems `first`, `first + 1`, … (its own pages among those of all problems): called as
``write(fitted, first, pages)`` for one group of layers after the other. What it raises ends the compression."""


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
) -> Slices[Compressed]:
    """Compress all problems of `source`: give out the pages by the rule `budget`, fit every problem by `method`, and
    hand each group of layers to `write` when it is done. What was written must not be used before all has been. What is
    returned tells of all problems and has no keys and values any more.

    Budgets need what every head loses, so layers are gone through twice. The first time leaves the order of the entries
    and the curves; the second time builds only the queries that fits use, and computes again what the full cache
    answers them. Where all layers fit in memory they are one group, which is built once, and everything is as in
    `compress.compress_in_slices`.

    Args:
        limit: the largest temporary, in floats; None means the device's (`memory.max_elements`).
        calibration: what adaptive budgets follow; None means a pilot on these problems.
        group_bytes: what a group of layers may take; None means the device's (`memory.GROUP_BYTES`).

    Raises:
        ValueError: an unknown method or budget rule, a total that cannot be given out, no query to fit or judge on, or
            a calibration of another number of heads.
    """
    if calibration is not None and len(calibration.losses) != source.num_problems:
        raise ValueError(f"calibration: of {len(calibration.losses)} heads, there are {source.num_problems}")
    limit = limit or max_elements(source.device)
    groups = list(layer_groups(source.num_layers, source.layer_bytes, group_bytes or GROUP_BYTES[source.device.type]))
    orders, curves, ready = [], [], None
    for layers in groups:
        of_group = None if calibration is None else calibration.part(source.problems_of(layers))
        problems = yield from source.of(layers)
        found = yield from survey_in_slices(problems, plan, method, budget, effort, limit=limit, calibration=of_group)
        orders.append(found.ranking.order)
        curves.append(found.curves)
        grid = found.grid  # that of all groups
        if len(groups) == 1:
            ready = thinned(problems, found.ranking, effort)
        del problems, found  # before the next ones are built
    given = [some for some in curves if some is not None]
    budgets = give_out(plan, source.num_problems, grid, np.concatenate(given) if given else None)
    judged = []
    for layers, order in zip(groups, orders, strict=True):
        own = source.problems_of(layers)
        problems, ranking = ready or (yield from _built_again(source, layers, order, effort, limit))
        ready = None
        fitted = yield from fit_thinned_in_slices(problems, plan, ranking, budgets.part(own), method, effort, limit)
        del problems, ranking
        write(fitted, own.start, budgets.pages)
        judged.append(replace(fitted, keys=[], values=[]))
        del fitted
        yield
    names = [name for name, value in vars(judged[0]).items() if isinstance(value, Tensor)]
    tensors = {name: torch.cat([getattr(part, name) for part in judged], dim=-1) for name in names}
    return Compressed(pages=budgets.pages, keys=[], values=[], **tensors)


compress_segment = at_once(compress_segment_in_slices)


def _built_again(
    source: SegmentSource, layers: range, order: Tensor, effort: Effort, limit: int
) -> Slices[tuple[Problems, Ranking]]:
    """Build what `compress.thinned` would keep of the problems of these layers, whose entries have this `order`."""
    problems = yield from source.of(layers, effort.fit_positions)
    ranking = yield from within(fast_matmul, rank_in_slices(problems, limit))
    return problems, replace(ranking, order=order)
