"""Keep entries by chance: what every method must beat, and the harness must show as bad."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsculpt_vllm.evaluation.methods.base import ToPages, surveyed
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Teacher


def random_choice(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
    """Keep entries in a random order, which is the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def score(part: Problems, teacher: Teacher) -> Tensor:
        return torch.rand(part.keys.shape[:2], generator=generator).to(part.keys.device)

    return surveyed("select", score)(problems, plan, budget, effort)
