"""What the outcomes of several ranks come to."""

from dataclasses import replace

import pytest

from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.engine.worker.agreement import Failure, agreed
from records import RECORD


def record(errors, seconds=1.0):
    """Of a rank whose heads lose `errors` (layers, heads); each keeps a hundred entries a unit of it."""
    flat = [error for row in errors for error in row]
    return replace(
        RECORD,
        **dict.fromkeys(("solver_steps", "heads_at_start", "failed_solves"), len(flat)),
        entries_kept=100 * sum(flat) / len(flat),
        seconds=seconds,
        error_before=1.0,
        error_after=sum(flat) / len(flat),
        budgets=[[round(100 * error) for error in row] for row in errors],
        errors=errors,
    )


# Two stages, of two layers and of one; two ranks with a head each.
WHOLE = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
RANKS = [
    [record([[1.0], [3.0]]), record([[2.0], [4.0]], seconds=2.0)],
    [record([[5.0]]), record([[6.0]])],
]


def test_heads_stand_side_by_side_layers_below_each_other_and_means_are_over_heads():
    result, teller = agreed(RANKS, max_error=3.5)
    assert teller == (0, 0)
    assert result.errors == WHOLE
    assert result.budgets == [[round(100 * error) for error in row] for row in WHOLE]
    assert result.error_after == pytest.approx(3.5) and result.entries_kept == pytest.approx(350)
    assert (result.seconds, result.solver_steps) == (2.0, 6)


def test_the_error_bound_is_held_by_all_together():
    """The first stage alone would pass: 2.5."""
    result, _ = agreed(RANKS, max_error=3.4)
    assert isinstance(result, Failure) and result.reason == Reason.ERROR_BOUND and result.by_rule


def test_one_failure_is_everybodys_and_told_by_the_rank_that_failed():
    failure = Failure.of(ValueError("no\nroom"))
    assert failure.description == r"ValueError: no\nroom"
    assert agreed([RANKS[0], [RANKS[1][0], failure]], max_error=9.0) == (failure, (1, 1))
