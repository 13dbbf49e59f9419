"""Values in closed form against torch.linalg.lstsq on the system that the ridge stands for."""

import dataclasses

import pytest
import torch

from kvsculpt_vllm.sculpt import values as values_module
from kvsculpt_vllm.sculpt.objective import Target
from kvsculpt_vllm.sculpt.values import STRONGER, ValueFit, fit_values

RIDGE = torch.tensor([1e-3, 0.1, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("size", [6, 14, 30])  # fewer, as many and more entries than the 14 training queries
def test_values_solve_the_augmented_least_squares_system(make_case, size):
    case = make_case()
    problems = case.problems
    train, _ = Target.split(problems, *case.teacher())
    keys, start = (x[:, :size] * 1.1 for x in case.entries)
    # Padding, and what is in it, must not change the others' values.
    sizes = [size, size - 2, size - 5]
    valid = torch.arange(size)[None] < torch.tensor(sizes)[:, None]
    values = fit_values(train, keys.masked_fill(~valid[..., None], 50.0), start, RIDGE, valid)
    for b, m in enumerate(sizes):
        rows = ~problems.held_out
        both = torch.cat([keys[b, :m], case.retained_keys[b]])
        weights = torch.softmax(problems.queries[b, rows] @ both.T * problems.scale, -1)
        true_out, _ = case.attention(problems.keys[b], problems.values[b], b)
        residual = true_out[rows] - weights[:, m:] @ case.retained_values[b] - weights[:, :m] @ start[b, :m]
        penalty = RIDGE[b] * weights[:, :m].square().sum() / m
        system = torch.cat([weights[:, :m], penalty.sqrt() * torch.eye(m, dtype=torch.float64)])
        change = torch.linalg.lstsq(system, torch.cat([residual, torch.zeros(m, 8)]), driver="gelsd").solution
        torch.testing.assert_close(values[b, :m], start[b, :m] + change, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(values[b, m:], start[b, m:])


@pytest.mark.parametrize("size", [6, 30])
def test_a_large_ridge_returns_the_start(make_case, size):
    case = make_case()
    train, _ = Target.split(case.problems, *case.teacher())
    keys, start = (x[:, :size] + 0.5 for x in case.entries)
    values = fit_values(train, keys, start, torch.full((3,), 1e12, dtype=torch.float64))
    torch.testing.assert_close(values, start, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [6, 30])
def test_a_head_whose_weights_underflow_keeps_its_values_and_leaves_the_others_alone(make_case, size):
    case = make_case(dtype=torch.float32)
    out, lse = (x.float() for x in case.teacher())
    keys, start = (x[:, :size] for x in case.entries)
    alone = fit_values(Target.split(case.problems, out, lse)[0], keys, start, RIDGE.float())
    # The retained entries of problem 1 get e^300 times the mass.
    out[1], lse[1] = case.problems.retained_out[1], case.problems.retained_lse[1] + 300
    problems = dataclasses.replace(
        case.problems, retained_lse=case.problems.retained_lse + torch.tensor([[0], [300], [0]])
    )
    train, _ = Target.split(problems, out, lse)
    assert (train.weights(keys, None)[1] == 0).all()
    values = fit_values(train, keys, start, RIDGE.float())
    assert torch.equal(values[1], start[1])
    torch.testing.assert_close(values[[0, 2]], alone[[0, 2]])


def test_a_system_that_cannot_be_factored_gets_stronger_ridges_and_one_that_never_can_is_counted(make_case):
    case = make_case(dtype=torch.float32)
    out, lse = (x.float() for x in case.teacher())
    keys, start = (x[:, :30].clone() for x in case.entries)
    keys[0, 1:] = keys[0, 0]  # all weights of a query equal: fp32 cannot factor the system without a ridge
    out[1, 0] = torch.nan
    train, _ = Target.split(case.problems, out, lse)
    train = dataclasses.replace(train, probes=train.probes.clone())
    train.probes[1, 0] = torch.nan
    fit = ValueFit(train, keys, start)
    values = fit.solve(torch.tensor([1e-8, 1e-3, 1e-3]))
    assert fit.failed.tolist() == [0, 1, 0]
    assert values[[0, 2]].isfinite().all() and torch.equal(values[1], start[1])
    helped = ValueFit(train, keys, start).solve(torch.tensor([1e-8 * STRONGER, 1e-3, 1e-3]))
    torch.testing.assert_close(values, helped)


@pytest.mark.parametrize("limit", [1, 1 << 20])  # one factorisation after the other, and all in one batch
@pytest.mark.parametrize("size", [6, 30])
def test_several_ridges_at_once_give_what_each_gives_alone(make_case, size, limit, monkeypatch):
    monkeypatch.setattr(values_module, "max_elements", lambda device: limit)
    case = make_case()
    train, _ = Target.split(case.problems, *case.teacher())
    keys, start = (x[:, :size] * 1.1 for x in case.entries)
    fit = ValueFit(train, keys, start)
    together = fit.solve_each(RIDGE)
    assert not fit.failed.any()
    for ridge, values in zip(RIDGE, together, strict=True):
        torch.testing.assert_close(values, ValueFit(train, keys, start).solve(ridge.expand(3)), rtol=1e-9, atol=1e-11)


def test_of_several_ridges_those_that_do_not_help_give_no_numbers(make_case):
    case = make_case(dtype=torch.float32)
    out, lse = (x.float() for x in case.teacher())
    keys, start = (x[:, :30].clone() for x in case.entries)
    keys[0, 1:] = keys[0, 0]  # fp32 cannot factor its system without a ridge
    out[1, 0] = torch.nan
    train, _ = Target.split(case.problems, out, lse)
    fit = ValueFit(train, keys, start)
    values = fit.solve_each(torch.tensor([1e-8, 1e-3, 1e-1]))
    assert fit.failed.tolist() == [0, 3, 0]
    assert values.isfinite().flatten(2).all(2).tolist() == [
        [False, False, True],
        [True, False, True],
        [True, False, True],
    ]
    assert values[0, :2].isnan().all()
