"""Which entries matter: the order selection keeps them in, and what is lost at every budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.problem import Problems


@dataclass(frozen=True)
class Ranking:
    """The entries of each problem in the order in which selection keeps them, and the pilot's error curve."""

    order: Tensor  # (B, n) entry indices, most attended first
    errors: Tensor  # (B, G) mean squared output error of plain selection, absolute, at each of G sizes


def rank(problems: Problems, sizes: list[int]) -> Ranking:
    """Order entries by the attention they receive, summed over the training queries of the head's group.

    This is the SnapKV-style score on our query mixture, and the start of KVSculpt. `sizes` (ascending, at most n)
    are the numbers of kept entries at which the pilot measures; all are had from one pass over the sorted entries.
    Call it on fp32 problems.
    """
    rows = (~problems.held_out).nonzero()[:, 0]
    queries = problems.queries[:, rows]
    out, lse = problems.teacher()
    out, lse = out[:, rows], lse[:, rows].unsqueeze(-1)
    retained = (problems.retained_lse[:, rows].unsqueeze(-1) - lse).exp()

    def weights(keys: Tensor) -> Tensor:
        return torch.bmm(queries, keys.transpose(1, 2)).mul_(problems.scale).sub_(lse).exp_()

    order = weights(problems.keys).sum(1).argsort(dim=1, descending=True)
    by_rank = order.unsqueeze(-1).expand_as(problems.keys)
    sorted_weights = weights(problems.keys.gather(1, by_rank))
    sorted_values = problems.values.gather(1, by_rank)
    numerator, mass = retained * problems.retained_out[:, rows], retained.clone()
    errors, done = [], 0
    for size in sizes:
        numerator = torch.baddbmm(numerator, sorted_weights[:, :, done:size], sorted_values[:, done:size])
        mass = mass + sorted_weights[:, :, done:size].sum(-1, keepdim=True)
        # A query whose weights on everything kept underflow is answered with 0, an error of its full output.
        kept_out = numerator / mass.clamp_min(torch.finfo(mass.dtype).tiny)
        errors.append((kept_out - out).square().sum(-1).mean(-1))
        done = size
    return Ranking(order, torch.stack(errors, dim=1))
