"""Attention Matching (arXiv 2602.16284, its HighestAttnKeys variant): selected keys, fitted masses, fitted values."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvsculpt_vllm.evaluation.methods.biased import BiasedCompressed
from kvsculpt_vllm.sculpt.compress import MAX_ELEMENTS, Compressed, Effort, PagePlan, compress
from kvsculpt_vllm.sculpt.objective import Target
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import teach
from kvsculpt_vllm.sculpt.solve import RIDGES
from kvsculpt_vllm.sculpt.values import ValueFit

NNLS_STEPS = 200
LEAST_WEIGHT = 1e-12


def attention_matching(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> Compressed:
    """Keys: those with the highest root mean square attention, at budgets by our rule. Then, over training queries,

    1. ``w = argmin_{w >= 0} Σ_q (Σ_j w_j e^(q·k_j/√d) - m_q)² / e^(2 z_q)``, m_q being the mass of the whole span and
       z_q the log-sum-exp over all entries; the bias of key j is β_j = log w_j;
    2. values by least squares of the output, the biases in the softmax.

    The paper solves 2. without a ridge. With as few queries as here that overfits, so it gets ours, chosen by
    held-out queries as for Select+Fit: a stronger peer. Its OMP variant, which takes minutes, is not here.
    """
    selected = compress(problems, plan, "select", budget, key_steps=0, power=2)
    fitted = BiasedCompressed(**vars(selected), biases=[torch.zeros(len(k)) for k in selected.keys])
    fitted_on = problems.with_rows(problems.thin_rows(effort.fit_positions * problems.group))
    for b, keys in enumerate(selected.keys):
        if len(keys) == problems.num_entries:
            fitted.biases[b] = fitted.biases[b].to(keys.device)
            continue
        own = fitted_on.take(torch.tensor([b], device=keys.device))
        teacher = teach(own, MAX_ELEMENTS[keys.device.type])
        train, held_out = (_with_bias(part) for part in Target.split(own, teacher.out, teacher.lse))
        start = selected.values[b][None].float()
        biases = _masses(train, keys[None].float()).clamp_min(LEAST_WEIGHT).log()
        biased = torch.cat([keys[None].float(), biases.unsqueeze(-1)], dim=-1)
        fit = ValueFit(train, biased, start)
        candidates = [fit.solve(start.new_tensor([ridge])).to(problems.values.dtype) for ridge in RIDGES]
        errors = torch.cat([held_out.loss(biased, values.float()) for values in candidates])
        best = int(errors.nan_to_num(nan=torch.inf).argmin())
        fitted.values[b], fitted.biases[b], fitted.error[b] = candidates[best][0], biases[0], errors[best]
    return fitted


def _with_bias(target: Target) -> Target:
    """The same target for keys with one more element, their bias: a probe is (scaled query, 1, -z*, 1)."""
    one = torch.ones_like(target.probes[..., :1])
    return dataclasses.replace(target, probes=torch.cat([target.scaled_queries, one, target.probes[..., -2:]], dim=-1))


def _masses(target: Target, keys: Tensor) -> Tensor:
    """The weights w (B, m) of step 1, by accelerated projected gradient from w = 1, which is plain selection."""
    features = target.weights(torch.cat([keys, torch.zeros_like(keys[..., :1])], dim=-1), None)  # (B, Q, m)
    wanted = 1.0 - target.retained_mass  # of a total mass of 1
    gram = torch.bmm(features.transpose(1, 2), features)
    right = torch.bmm(features.transpose(1, 2), wanted)
    # The largest row sum bounds the largest eigenvalue of a matrix without negative elements.
    step = 1.0 / gram.sum(-1).amax(-1).clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]
    weights = momentum = torch.ones_like(right)
    pace = 1.0
    for _ in range(NNLS_STEPS):
        ahead = (momentum - step * (torch.bmm(gram, momentum) - right)).clamp_min(0.0)
        faster = (1.0 + (1.0 + 4.0 * pace * pace) ** 0.5) / 2.0
        momentum = ahead + (pace - 1.0) / faster * (ahead - weights)
        weights, pace = ahead, faster
    return weights.squeeze(-1)
