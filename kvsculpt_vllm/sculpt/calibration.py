"""What a model's heads lose at every budget, measured once for the model instead of by a pilot on each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvsculpt_vllm.sculpt.budgets import PagePlan, grid_of


@dataclass(frozen=True)
class Calibration:
    """Curves as `survey.pilot` finds them, averaged over contexts.

    Which heads need many entries is nearly the model's own, and one prompt's pilot measures it with much noise: budgets
    by averaged curves are better than those by the prompt's own, and cost nothing (benchmarks/LOG.md).
    """

    fractions: tuple[float, ...]  # (G,) of a span's pages, ascending, the last one 1
    losses: np.ndarray  # (B, G) what each head loses with them, heads in the order of the problems

    def grid(self, plan: PagePlan) -> list[int]:
        """The page counts that stand for the fractions in the plan's span."""
        return grid_of(plan, self.fractions)

    def curves(self, grid: Sequence[int], plan: PagePlan) -> np.ndarray:
        """What each head loses (B, len(grid)) at the page counts in `grid`; below the smallest fraction, as there."""
        at = np.array(grid) / plan.span_pages
        return np.stack([np.interp(at, self.fractions, losses) for losses in self.losses])
