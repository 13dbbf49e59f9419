"""Give selected keys the mass of the entries they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.matmul import matvec, rounded_products
from kvsculpt_vllm.sculpt.objective import Target

ITERATIONS = 20
MOST = 50.0
"""An entry stands for at most so many: beyond it the bias is noise of a few queries."""

LEAST_STEEP = 0.1
"""Under a soft cap a logit that hardly moves with its key gets no more than ten times the bias."""


def match_mass(
    target: Target,
    keys: Tensor,  # (B, m, D)
    valid: Tensor | None = None,  # (B, m), False for padding
    weights: Tensor | None = None,  # `target.weights(keys, valid)` if they are there
) -> Tensor:
    """Keys (B, m, D) moved so that, for each query, their mass comes closer to that of the whole span.

    Selection drops entries and with them their part of the softmax's denominator. Attention Matching (arXiv
    2602.16284) restores it by a bias β per entry, fitted by non-negative least squares on the mass,
    ``min_x≥0 Σ_q (Σ_j x_j e^logit_qj - (e^z* - e^z_r))²`` with β = log x; here by multiplicative updates (Lee &
    Seung), which keep x positive and batch well. A page has no place for β, so it goes into the key: with u the
    ridge solution of ``q·u ≈ 1`` over the queries, the key k + β u has the logit k·q + β, nearly
    (docs/algorithm.md#mass). Under a soft cap the logit moves less than its key, so that the key moves by more.
    """
    if weights is None:
        weights = target.weights(keys, valid)  # (B, Q, m), in parts of the teacher's mass
    missing = (1.0 - target.retained_mass).clamp_min(0.0)  # (B, Q, 1) the span's share
    transposed = weights.transpose(1, 2)
    wanted = matvec(transposed, missing)
    tiny = torch.finfo(weights.dtype).tiny
    # Where there are fewer entries than queries, as nearly always, their Gram matrix is by far the smaller one.
    with rounded_products(weights.device):
        gram = torch.bmm(transposed, weights) if weights.shape[2] < weights.shape[1] else None
    x = torch.ones_like(wanted)
    for _ in range(ITERATIONS):
        mass = matvec(transposed, matvec(weights, x)) if gram is None else matvec(gram, x)
        x.mul_(wanted).div_(mass.clamp_min_(tiny))
    # 0/0 for padding and for entries that no query sees: no bias.
    bias = x.clamp(1.0 / MOST, MOST).log().nan_to_num(nan=0.0)
    if (steepness := target.steepness(keys, weights)) is not None:
        bias = bias / steepness.clamp_min(LEAST_STEEP)
    if valid is not None:
        bias = bias * valid.unsqueeze(-1)
    return keys + bias * _constant_logit(target)


def _constant_logit(target: Target) -> Tensor:
    """A direction u (B, 1, D) whose logit is as near to 1 for every query as pays for its length.

    Length counts (`Target.foreign_weight`) because queries that are not among these see any logit along it.
    """
    queries = target.scaled_queries
    gram = torch.bmm(queries.transpose(1, 2), queries)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    foreign = queries.shape[1] * target.foreign_weight[:, None]
    diagonal.add_(1e-3 * diagonal.mean(1, keepdim=True) + foreign + 1e-12)
    # Without a check for singular matrices, which would wait for the device: none is, with what was added.
    return torch.linalg.solve_ex(gram, queries.sum(1, keepdim=True).transpose(1, 2)).result.transpose(1, 2)
