"""Expected Attention (arXiv 2510.00636): keep what future queries, taken as Gaussian, would attend to."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsculpt_vllm.evaluation.methods.base import ToPages, surveyed
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Teacher


def expected_attention(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
    """Score of entry (k, v): ``softmax_k(μ·k/√d + kᵀΣk/2d) |v|``, averaged over the query heads of the group.

    μ and Σ are the mean and covariance of a query head's future queries: the prompt's queries asked from the 512
    positions after its end. The paper rotates the moments of the unrotated queries by the mean rotation instead;
    those of the rotated queries describe the same distribution without that approximation.

    Raises:
        NotImplementedError: the model has a soft cap, under which that mean has no closed form.
    """
    if problems.soft_cap is not None:
        raise NotImplementedError("Expected Attention has no formula for a soft cap on logits: leave this method out")
    return surveyed("select", _expected)(problems, plan, budget, effort)


def _expected(problems: Problems, teacher: Teacher) -> Tensor:
    num_positions = problems.queries.shape[1] // problems.group
    num_future = num_positions - problems.recent
    heads = problems.queries.unflatten(1, (num_positions, problems.group))[:, :num_future] * problems.scale
    score = torch.zeros_like(problems.keys[..., 0])
    for queries in heads.unbind(2):  # (B, P, D) of one query head of the group
        mean = queries.mean(1, keepdim=True)
        centred = queries - mean
        covariance = torch.bmm(centred.transpose(1, 2), centred) / num_future
        spread = (torch.bmm(problems.keys, covariance) * problems.keys).sum(-1) / 2.0
        score += (torch.bmm(problems.keys, mean.transpose(1, 2)).squeeze(-1) + spread).softmax(-1)
    return score * problems.values.norm(dim=-1)
