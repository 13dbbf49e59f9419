"""KVSculpt as its paper states it (arXiv 2603.27819): no query held out, nothing to fall back to."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvsculpt_vllm.evaluation.methods.base import ToPages, heads_to_fit
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import Compressed, fit
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.lbfgs import BatchedLBFGS
from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.objective import Target
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.survey import Survey, survey
from kvsculpt_vllm.sculpt.values import fit_values

KEY_STEPS = 100
REFIT_EVERY = 5
RIDGE = 1e-3
"""Relative to the mean diagonal of the values' Gram matrix; the paper's strength is not public."""


def kvsculpt_paper(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
    """Start: the entries with the most accumulated attention. Then, 100 times, one L-BFGS step of the keys on
    ``mean |o - o*|² + mean (z - z*)²``, with values by ridge least squares at the start and every 5 steps.

    Adaptive budgets are by our rule, from the error of selection: the paper's formula is not public. Its output term
    is divided by the output's mean power here as in our loss, or the two terms would have no common unit.
    """
    found = survey(problems, plan, "select", budget, effort)
    return lambda plan: _as_published(problems, plan, found, effort)


def _as_published(problems: Problems, plan: PagePlan, found: Survey, effort: Effort) -> Compressed:
    fitted = fit(problems, plan, found, "select", effort)
    for b, own, teacher in heads_to_fit(problems, found, fitted.keys, effort):
        keys = fitted.keys[b]
        none = torch.zeros_like(own.held_out)
        everything, _ = Target.split(dataclasses.replace(own, held_out=none), teacher.teacher_out, teacher.teacher_lse)
        _, held_out = Target.split(own, teacher.teacher_out, teacher.teacher_lse)
        with fast_matmul():
            fitted_keys, values = _sculpt(everything, keys[None].float())
            # They were fitted to: this error flatters, which is the paper's way.
            fitted.error[b], fitted.steps[b] = held_out.loss(fitted_keys, values)[0], KEY_STEPS
        fitted.keys[b], fitted.values[b] = fitted_keys[0].to(keys.dtype), values[0].to(keys.dtype)
    return fitted


def _sculpt(target: Target, start: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (1, m, D) of one problem, from keys `start` (1, m, D)."""
    ridge, zero = start.new_tensor([RIDGE]), torch.zeros_like(start)
    values = fit_values(target, start, zero, ridge)

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = target.loss_and_grad(x.view_as(start), values)
        return loss, grad.flatten(1)

    x = start.flatten(1)
    optimizer = BatchedLBFGS(x, *evaluate(x))
    for step in range(1, KEY_STEPS + 1):
        optimizer.step(evaluate)
        if step % REFIT_EVERY == 0:
            values = fit_values(target, optimizer.x.view_as(start), zero, ridge)
            optimizer.restart_at(*evaluate(optimizer.x))
    return optimizer.x.view_as(start), values
