"""Attention Matching (arXiv 2602.16284): selected keys, fitted masses, fitted values."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvsculpt_vllm.evaluation.methods.base import ToPages, heads_to_fit
from kvsculpt_vllm.evaluation.methods.biased import BiasedCompressed
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import fit
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.objective import Target
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.solve import RIDGES
from kvsculpt_vllm.sculpt.survey import Survey, survey
from kvsculpt_vllm.sculpt.values import ValueFit

NNLS_STEPS = 200
PICKS = 16
"""Keys that OMP takes at once (the paper's fast variant: 4; on a CPU that is the patience there is)."""
PURSUIT_STEPS = 30
LEAST_WEIGHT = 1e-12


def attention_matching(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
    """Keys: those with the highest root mean square attention, at budgets by our rule, from the error of selection.
    Then, over training queries,

    1. ``w = argmin_{w >= 0} Σ_q (Σ_j w_j e^(q·k_j/√d) - m_q)² / e^(2 z_q)``, m_q being the mass of the whole span and
       z_q the log-sum-exp over all entries; the bias of key j is β_j = log w_j;
    2. values by least squares of the output, the biases in the softmax.

    The paper solves 2. without a ridge. With as few queries as here that overfits, so it gets ours, chosen by
    held-out queries as for Select+Fit: a stronger peer. This is its HighestAttnKeys variant.
    """
    found = survey(problems, plan, "select", budget, effort, power=2)
    return lambda plan: _match(problems, plan, found, effort)


def attention_matching_our_budgets(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
    """The same with the budgets that `sculpt` gives out, so that what is left of the difference is the fit's alone."""
    found = survey(problems, plan, "sculpt", budget, effort)
    return lambda plan: _match(problems, plan, found, effort)


def attention_matching_omp(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
    """The OMP variant: keys are picked for the mass of the training queries, those first whose column of the problem
    in 1. goes best with what the ones before leave over (orthogonal matching pursuit), `PICKS` between two solutions.
    """
    found = survey(problems, plan, "select", budget, effort, power=2)
    return lambda plan: _match(problems, plan, found, effort, pursue=True)


def _match(problems: Problems, plan: PagePlan, found: Survey, effort: Effort, pursue: bool = False) -> BiasedCompressed:
    selected = fit(problems, plan, found, "select", effort)
    # A bias of 0 for the heads that keep everything.
    biases = [torch.zeros(len(keys), device=keys.device) for keys in selected.keys]
    fitted = BiasedCompressed(**vars(selected), biases=biases)
    for b, own, teacher in heads_to_fit(problems, found, selected.keys, effort):
        keys = selected.keys[b]
        train, held_out = (_with_bias(part) for part in Target.split(own, teacher.teacher_out, teacher.teacher_lse))
        with fast_matmul():
            if pursue:
                chosen = _pursue(train, own.keys, len(keys))
                keys, start = problems.keys[b, chosen], own.values[:, chosen]
                fitted.keys[b] = keys
            else:
                start = selected.values[b][None].float()
            fitted_biases = _masses(train, keys[None].float()).clamp_min(LEAST_WEIGHT).log()
            biased = torch.cat([keys[None].float(), fitted_biases.unsqueeze(-1)], dim=-1)
            solver = ValueFit(train, biased, start)
            candidates = [solver.solve(start.new_tensor([ridge])).to(problems.values.dtype) for ridge in RIDGES]
            # Not `loss`: with a bias behind it a key is longer than its value, which no kernel knows.
            errors = held_out.losses(biased, torch.stack(candidates).float())[:, 0]
        best = int(errors.nan_to_num(nan=torch.inf).argmin())
        fitted.values[b], fitted.biases[b], fitted.error[b] = candidates[best][0], fitted_biases[0], errors[best]
    return fitted


def _with_bias(target: Target) -> Target:
    """The same target for keys with one more element, their bias: a probe is (scaled query, 1, -z*, 1). A soft cap
    does not reach it (`Target._capped_logits`).
    """
    one = torch.ones_like(target.probes[..., :1])
    return dataclasses.replace(target, probes=torch.cat([target.scaled_queries, one, target.probes[..., -2:]], dim=-1))


def _masses(target: Target, keys: Tensor) -> Tensor:
    """The weights w (B, m) of step 1, from w = 1, which is plain selection."""
    features, wanted = _mass_problem(target, keys)
    gram = torch.bmm(features.transpose(1, 2), features)
    right = torch.bmm(features.transpose(1, 2), wanted)
    return _non_negative(gram, right, torch.ones_like(right), NNLS_STEPS).squeeze(-1)


def _pursue(target: Target, keys: Tensor, count: int) -> Tensor:
    """Indices (count,) of the keys (1, n, D) that orthogonal matching pursuit picks."""
    features, wanted = _mass_problem(target, keys)
    gram = torch.bmm(features.transpose(1, 2), features)
    right = torch.bmm(features.transpose(1, 2), wanted)
    length = gram[0].diagonal().sqrt().clamp_min(torch.finfo(gram.dtype).tiny)
    chosen, weights = torch.empty(0, dtype=torch.long, device=keys.device), right[:, :0]
    left = right
    while len(chosen) < count:
        fit = (left[0, :, 0] / length).index_fill(0, chosen, -torch.inf)
        more = fit.topk(min(PICKS, count - len(chosen))).indices
        chosen, weights = (
            torch.cat([chosen, more]),
            torch.cat([weights, torch.zeros_like(right[:, : len(more)])], dim=1),
        )
        within = gram[:, chosen]
        weights = _non_negative(within[..., chosen], right[:, chosen], weights, PURSUIT_STEPS)
        left = right - torch.bmm(within.transpose(1, 2), weights)
    return chosen


def _mass_problem(target: Target, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Each key's mass (B, Q, m) and the span's (B, Q, 1), in parts of the whole mass."""
    features = target.weights(torch.cat([keys, torch.zeros_like(keys[..., :1])], dim=-1), None)
    return features, 1.0 - target.retained_mass


def _non_negative(gram: Tensor, right: Tensor, weights: Tensor, steps: int) -> Tensor:
    """Non-negative least squares (B, m, 1) from its normal equations, by accelerated projected gradient."""
    # The largest row sum bounds the largest eigenvalue of a matrix without negative elements.
    step = 1.0 / gram.sum(-1).amax(-1).clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]
    momentum, pace = weights, 1.0
    for _ in range(steps):
        ahead = (momentum - step * (torch.bmm(gram, momentum) - right)).clamp_min(0.0)
        faster = (1.0 + (1.0 + 4.0 * pace * pace) ** 0.5) / 2.0
        momentum = ahead + (pace - 1.0) / faster * (ahead - weights)
        weights, pace = ahead, faster
    return weights
