"""Keep entries by chance: what every method must beat, and the harness must show as bad."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsculpt_vllm.evaluation.methods.scored import keep_by_score
from kvsculpt_vllm.sculpt.compress import Compressed, Effort, PagePlan
from kvsculpt_vllm.sculpt.problem import Problems


def random_choice(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> Compressed:
    """The same random order in every run."""
    generator = torch.Generator().manual_seed(0)

    def score(batch: Problems) -> Tensor:
        return torch.rand(batch.keys.shape[:2], generator=generator).to(batch.keys.device)

    return keep_by_score(problems, plan, budget, score)
