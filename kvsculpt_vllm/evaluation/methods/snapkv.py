"""SnapKV (arXiv 2404.14469): keep what the prompt's last queries attend to, and its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvsculpt_vllm.evaluation.methods.base import ToPages, surveyed
from kvsculpt_vllm.kernels.soft_cap import capped
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Teacher

POOLED = 7
"""Neighbouring entries of which each takes the highest score."""


def snapkv(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
    """Score of entry j: ``maxpool_7(Σ_q p_qj)`` over the observation window's queries and the head's group.

    The window is the prompt's last 64 positions, whose real queries every problem has.
    """
    return surveyed("select", _observed)(problems, plan, budget, effort)


def _observed(problems: Problems, teacher: Teacher) -> Tensor:
    rows = slice(-problems.recent * problems.group, None)
    logits = torch.bmm(problems.queries[:, rows] * problems.scale, problems.keys.transpose(1, 2))
    capped(logits, problems.soft_cap)
    shares = (logits - teacher.lse[:, rows].unsqueeze(-1)).exp()
    return max_pool1d(shares.sum(1), POOLED, stride=1, padding=POOLED // 2)
