"""Budgets against brute force over every way to give out the pages."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsculpt_vllm.sculpt.budgets import adaptive_budgets, uniform_budgets


@st.composite
def tasks(draw, values):
    """Error curves, their grid and a total that can be given out."""
    grid = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=5)))
    heads = draw(st.integers(1, 4))
    errors = [draw(st.lists(values, min_size=len(grid), max_size=len(grid))) for _ in range(heads)]
    total = draw(st.integers(heads * grid[0], heads * grid[-1]))
    return np.array(errors), grid, total


def envelope(grid, curve, pages):
    """The lower convex envelope of the best error up to each point: the lowest chord over `pages`."""
    best = np.minimum.accumulate(curve)
    chords = itertools.combinations_with_replacement(range(len(grid)), 2)
    return min(
        np.interp(pages, [grid[i], grid[j]], [best[i], best[j]]) if i < j else best[i]
        for i, j in chords
        if grid[i] <= pages <= grid[j]
    )


@settings(max_examples=80, deadline=None)
@given(tasks(st.floats(0, 100)))
def test_budgets_are_the_optimum_of_the_convexified_curves(task):
    errors, grid, total = task
    pages = adaptive_budgets(errors, grid, total)
    assert sum(pages) == total
    assert all(grid[0] <= p <= grid[-1] for p in pages)
    assert pages == adaptive_budgets(errors.copy(), list(grid), total)
    every = range(grid[0], grid[-1] + 1)
    cost = [{p: envelope(grid, curve, p) for p in every} for curve in errors]
    # The cheapest way to give heads 0..b any number of pages, head by head.
    cheapest = {0: 0.0}
    for head in cost:
        sums = [(given + p, c + head[p]) for given, c in cheapest.items() for p in every]
        cheapest = {s: min(c for t, c in sums if t == s) for s in {t for t, _ in sums}}
    assert sum(head[p] for head, p in zip(cost, pages, strict=True)) == pytest.approx(cheapest[total], rel=1e-9)


def test_convex_curves_get_the_true_optimum():
    grid = [1, 2, 3, 4, 5]
    errors = np.array([[8.0, 4.0, 2.0, 1.0, 0.0], [50.0, 20.0, 10.0, 5.0, 2.0], [0.3, 0.2, 0.1, 0.05, 0.0]])
    for total in range(3, 16):
        splits = [s for s in itertools.product(grid, repeat=3) if sum(s) == total]
        best = min(sum(curve[p - 1] for curve, p in zip(errors, s, strict=True)) for s in splits)
        pages = adaptive_budgets(errors, grid, total)
        assert sum(curve[p - 1] for curve, p in zip(errors, pages, strict=True)) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(tasks(st.sampled_from([0.0, 1.0, 7.0, 1e30, np.inf, np.nan])))
def test_errors_that_are_not_finite_still_give_a_valid_budget(task):
    errors, grid, total = task
    pages = adaptive_budgets(errors, grid, total)
    assert sum(pages) == total and all(grid[0] <= p <= grid[-1] for p in pages)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_head_without_a_finite_error_does_not_disturb_the_others(place, broken):
    grid = [1, 2, 4]
    errors = np.array([[9.0, 3.0, 1.0], [30.0, 28.0, 0.5]])
    with_broken = np.insert(errors, place, broken, axis=0)
    for total in range(2, 9):
        pages = adaptive_budgets(with_broken, grid, total + 1)
        assert pages.pop(place) == 1
        assert pages == adaptive_budgets(errors, grid, total)


def test_uniform_budgets_are_as_equal_as_can_be():
    assert uniform_budgets(4, 10, 1, 5) == [3, 3, 2, 2]
    assert uniform_budgets(3, 15, 1, 5) == [5, 5, 5]


@pytest.mark.parametrize("total", [5, 31])
def test_a_total_that_cannot_be_given_out_is_refused_with_its_numbers(total):
    message = rf"cannot give {total} pages to 3 heads that take 2 to 10 pages each \(6 to 30 in all\)"
    with pytest.raises(ValueError, match=message):
        adaptive_budgets(np.ones((3, 2)), [2, 10], total)
    with pytest.raises(ValueError, match=message):
        uniform_budgets(3, total, 2, 10)
