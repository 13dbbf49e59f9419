"""Which entries matter: the order selection keeps them in, and what is lost at every budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.attention import merge
from kvsculpt_vllm.sculpt.objective import LSE_WEIGHT
from kvsculpt_vllm.sculpt.problem import Problems


@dataclass(frozen=True)
class Ranking:
    """The entries of each problem in the order in which selection keeps them, and what was measured on the way."""

    order: Tensor  # (B, n) entry indices, most attended first
    errors: Tensor  # (B, G) loss of plain selection at each of G sizes, in absolute units (see `rank`)
    teacher_out: Tensor  # (B, Q, D)
    teacher_lse: Tensor  # (B, Q)

    @classmethod
    def join(cls, parts: list[Ranking]) -> Ranking:
        """The rankings of consecutive problems as one."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})

    def take(self, index: Tensor) -> Ranking:
        """The rankings of the problems in `index`."""
        return Ranking(**{name: tensor[index] for name, tensor in vars(self).items()})

    def with_rows(self, rows: Tensor) -> Ranking:
        """The same ranking with the teacher of the query rows `rows` only."""
        return replace(self, teacher_out=self.teacher_out[:, rows], teacher_lse=self.teacher_lse[:, rows])


def rank(problems: Problems, sizes: list[int]) -> Ranking:
    """Order entries by the attention they receive, summed over the training queries of the head's group.

    This is the SnapKV-style score on our query mixture, and the start of KVSculpt. `sizes` (ascending, at most n)
    are the numbers of kept entries at which the pilot measures the solver's loss, times the output's mean power: what
    a head adds to the residual stream counts, not how well it does by its own standards, and a head that loses mass
    answers wrongly once the tail has grown. Everything comes from one matrix of weights, laid
    out by entry (B, n, Q) so that sorting entries moves whole rows. Call it on fp32 problems.
    """
    ones = torch.ones_like(problems.values[..., :1])
    values = torch.cat([problems.values, ones], dim=-1)  # the column of ones sums the weights
    weights = torch.bmm(problems.keys, problems.queries.transpose(1, 2) * problems.scale)
    peak = weights.amax(1, keepdim=True)
    weights = weights.sub_(peak).exp_()
    both = torch.bmm(weights.transpose(1, 2), values)
    span_mass = both[..., -1]
    teacher_out, teacher_lse = merge(
        both[..., :-1] / both[..., -1:], span_mass.log() + peak[:, 0], problems.retained_out, problems.retained_lse
    )

    rows = (~problems.held_out).nonzero()[:, 0]
    to_share = (peak[:, 0] - teacher_lse).exp()  # from weights relative to the peak to shares of the softmax
    retained = (problems.retained_lse - teacher_lse).exp().unsqueeze(-1)[:, rows]
    scored = (to_share * ~problems.held_out).unsqueeze(-1)
    order = torch.bmm(weights, scored).squeeze(-1).argsort(dim=1, descending=True)
    summed = torch.cat([retained * problems.retained_out[:, rows], retained], dim=-1)
    norm = teacher_out.square().sum(-1).mean(-1)
    errors, done = [], 0
    for size in sizes:
        kept = order[:, done:size].unsqueeze(-1)
        segment = weights.take_along_dim(kept, dim=1).transpose(1, 2)
        added = torch.bmm(segment, values.take_along_dim(kept, dim=1)) * to_share.unsqueeze(-1)
        summed = summed + added[:, rows]
        # A query whose weights on everything kept underflow is answered with 0, an error of its full output.
        mass = summed[..., -1:].clamp_min(torch.finfo(summed.dtype).tiny)
        output_error = (summed[..., :-1] / mass - teacher_out[:, rows]).square().sum(-1).mean(-1)
        errors.append(output_error + LSE_WEIGHT * norm * mass.log().square().mean((1, 2)))
        done = size
    return Ranking(order, torch.stack(errors, dim=1), teacher_out, teacher_lse)
