"""KeyDiff (arXiv 2504.15364): keep the keys that are least like the others."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvsculpt_vllm.evaluation.methods.base import ToPages, surveyed
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Teacher


def keydiff(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
    """Score of key k: ``-cos(k, a)``, the anchor a being the mean of the normalised keys. It asks no queries."""
    return surveyed("select", _unlikeness)(problems, plan, budget, effort)


def _unlikeness(problems: Problems, teacher: Teacher) -> Tensor:
    anchor = normalize(problems.keys, dim=-1).mean(1, keepdim=True)
    return -cosine_similarity(problems.keys, anchor, dim=-1)
