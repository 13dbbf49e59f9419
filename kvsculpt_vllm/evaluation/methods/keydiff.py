"""KeyDiff (arXiv 2504.15364): keep the keys that are least like the others."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvsculpt_vllm.evaluation.methods.scored import keep_by_score
from kvsculpt_vllm.sculpt.compress import Compressed, Effort, PagePlan
from kvsculpt_vllm.sculpt.problem import Problems


def keydiff(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> Compressed:
    """Score of key k: ``-cos(k, a)``, the anchor a being the mean of the normalised keys. It asks no queries."""
    return keep_by_score(problems, plan, budget, _score)


def _score(batch: Problems) -> Tensor:
    anchor = normalize(batch.keys, dim=-1).mean(1, keepdim=True)
    return -cosine_similarity(batch.keys, anchor, dim=-1)
