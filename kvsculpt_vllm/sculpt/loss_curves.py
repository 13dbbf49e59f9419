"""What a model's heads lose at every budget, measured once for the model instead of by a pilot on each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvsculpt_vllm.sculpt.budgets import PagePlan, grid_of
from kvsculpt_vllm.sculpt.foretold import QueryMaps


@dataclass(frozen=True)
class LossCurves:
    """What each of B heads loses at some fractions of its span's pages: curves as `survey.pilot` finds them, averaged
    over contexts.

    Which heads need many entries is largely the model's own, and one prompt's pilot measures it with noise. Budgets by
    averaged curves cost nothing, and lose less on one model of two that were measured (benchmarks/LOG.md).
    """

    fractions: tuple[float, ...]  # (G,) of a span's pages, ascending, the last one 1
    losses: np.ndarray  # (B, G) what each head loses with them, heads in the order of the problems
    # (B, G) the same of a segment that others follow, which is read from afar: heads that look near need few entries
    # there. None in files that were written before this was measured: such segments then go by `losses`.
    followed: np.ndarray | None = None
    power: int | None = None  # that the model's entries are ranked by, see `survey.POWERS`; None means the method's own
    query_maps: QueryMaps | None = None  # of the heads whose entries are ranked by a foretold second reading, too

    def part(self, own: slice) -> LossCurves:
        """Keep the heads in `own`."""
        followed = None if self.followed is None else self.followed[own]
        maps = None if self.query_maps is None else self.query_maps.part(own)
        return LossCurves(self.fractions, self.losses[own], followed, self.power, maps)

    def grid(self, plan: PagePlan) -> list[int]:
        """Count the pages of the plan's span, ascending, that the fractions come to."""
        return grid_of(plan, self.fractions)

    def curves(self, grid: Sequence[int], plan: PagePlan, followed: bool = False) -> np.ndarray:
        """Read off what each head loses (B, len(grid)) at the page counts in `grid`, in a segment that others follow or
        in one that none does.

        One page of a long span can be a smaller fraction of it than any that was measured. Below the smallest fraction
        a loss goes on as a power of the fraction, with the exponent that it has between the two smallest ones. If it
        stayed flat, a head would seem to gain nothing from its second page, and would get none.
        """
        at = np.array(grid) / plan.span_pages
        measured = self.followed if followed and self.followed is not None else self.losses
        found = np.stack([np.interp(at, self.fractions, losses) for losses in measured])
        below, (first, second) = at < self.fractions[0], self.fractions[:2]
        tiny = np.finfo(np.float64).tiny
        fall = np.log(np.maximum(measured[:, 0], tiny) / np.maximum(measured[:, 1], tiny))
        power = np.maximum(fall, 0) / np.log(second / first)
        found[:, below] *= (first / at[below]) ** power[:, None]
        return found
