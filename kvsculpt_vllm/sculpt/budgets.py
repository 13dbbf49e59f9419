"""How many pages each (layer, KV head) gets, from one total."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PagePlan:
    """The pages to give out for one request."""

    block_size: int  # entries a page
    span_pages: int  # pages a head's span fills now, the most it may get
    total: int  # pages to give out to all heads together
    sinks: int  # entries of each head's first page that are kept exactly and not part of the problem

    def entries(self, pages: int) -> int:
        """Count a problem's entries that `pages` pages hold: all that fit, without the sinks."""
        return min(pages, self.span_pages) * self.block_size - self.sinks

    @property
    def least(self) -> int:
        """The fewest pages that hold the sinks and one more entry."""
        return math.ceil((self.sinks + 1) / self.block_size)


def span_sizes(num_tokens: int, window: int, block_size: int, keep_ratio: float) -> tuple[int, int]:
    """Count the blocks of a prompt's span, and those of the packed prefix that replaces it. At least the last `window`
    tokens stay outside the span.
    """
    blocks = max(num_tokens - window, 0) // block_size
    return blocks, blocks_kept(keep_ratio, blocks)


def blocks_kept(keep_ratio: float, blocks: int) -> int:
    """Count the blocks that a fraction of `blocks` comes to, rounded up and at least one."""
    # 0.07 * 100 is 7.000000000000001: what a rounding error adds must not cost a block.
    return max(1, math.ceil(keep_ratio * blocks - 1e-9))


def grid_of(plan: PagePlan, fractions: Sequence[float]) -> list[int]:
    """List page counts, ascending: the least that a head may get, those that `fractions` of the span come to, and the
    whole span.
    """
    inner = {round(fraction * plan.span_pages) for fraction in fractions}
    return sorted({plan.least, plan.span_pages} | {p for p in inner if plan.least < p < plan.span_pages})


def uniform_budgets(num_problems: int, total: int, least: int, most: int) -> list[int]:
    """Give every problem the same number of pages. Those that are left over go to the first problems, one each.

    Raises:
        ValueError: the total cannot be reached with every problem between `least` and `most`.
    """
    _check(num_problems, total, least, most)
    each, rest = divmod(total, num_problems)
    return [each + (i < rest) for i in range(num_problems)]


def adaptive_budgets(
    errors: np.ndarray,  # (B, G) error of problem b with grid[g] pages, absolute
    grid: Sequence[int],  # (G,) ascending page counts; the first is the least, the last the most a problem may get
    total: int,
) -> list[int]:
    """Pages per problem, summing to `total`, that minimise the summed error of the curves.

    The greedy marginal gain on the lower convex hull of each curve is the exact minimum of the convexified
    problem. KVSculpt redistributes one total by each head's pilot error; its formula is not public, and the hull
    halved the KL of uniform budgets in a prototype (docs/algorithm.md#budgets).

    Raises:
        ValueError: the total cannot be reached with every problem between the grid's ends.
    """
    errors = np.asarray(errors, dtype=np.float64)
    num_problems = len(errors)
    least, most = grid[0], grid[-1]
    _check(num_problems, total, least, most)
    hulls = [_lower_hull(grid, curve) for curve in errors]
    pages = [least] * num_problems
    left = total - least * num_problems
    # One heap entry a problem: the gain per page of its next hull segment. The index breaks ties, so equal input
    # gives equal budgets on every rank and run.
    heap = [(-hull[1][2], b, 1) for b, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(heap)
    while left > 0:
        _, b, segment = heapq.heappop(heap)
        give = min(hulls[b][segment][0] - pages[b], left)
        pages[b] += give
        left -= give
        if segment + 1 < len(hulls[b]):
            heapq.heappush(heap, (-hulls[b][segment + 1][2], b, segment + 1))
    return pages


def _lower_hull(grid: Sequence[int], curve: np.ndarray) -> list[tuple[int, float, float]]:
    """Vertices (pages, error, gain per page of the segment that ends here) of the curve's lower convex hull.

    The first pages are where plain selection is noisiest: a curve that rises is cut down to its running minimum.
    What is not finite counts as the largest number: a gain between two infinities would have no order.
    """
    largest = float(np.finfo(np.float64).max)
    curve = np.minimum.accumulate(np.nan_to_num(curve, nan=largest, posinf=largest))
    hull: list[tuple[int, float, float]] = []
    for x, y in zip(grid, curve, strict=True):
        while len(hull) > 1 and (hull[-1][1] - y) / (x - hull[-1][0]) >= hull[-1][2]:
            hull.pop()
        gain = (hull[-1][1] - y) / (x - hull[-1][0]) if hull else 0.0
        hull.append((x, float(y), float(gain)))
    return hull


def _check(num_problems: int, total: int, least: int, most: int) -> None:
    if not num_problems * least <= total <= num_problems * most:
        raise ValueError(
            f"cannot give {total} pages to {num_problems} heads that take {least} to {most} pages each "
            f"({num_problems * least} to {num_problems * most} in all)"
        )
