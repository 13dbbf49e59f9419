"""How far a set of compressed entries is from the full cache, and the gradient with respect to the keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.problem import Problems

LSE_WEIGHT = 1.0
"""Weight of the log-sum-exp term. Both terms are relative (a squared logit error is a squared relative mass error)."""


@dataclass(frozen=True)
class Target:
    """What B problems are measured against, on one subset of their queries.

    The loss of a problem is, averaged over its queries,
    ``|o - o*|² / mean|o*|² + LSE_WEIGHT (z - z*)²`` (KVSculpt: output MSE + log-sum-exp MSE), o and z being the
    softmax over compressed and retained entries together.
    """

    queries: Tensor  # (B, Q, D)
    out: Tensor  # (B, Q, D) o*
    lse: Tensor  # (B, Q) z*
    retained_lse: Tensor  # (B, Q)
    retained_out: Tensor  # (B, Q, D)
    out_norm: Tensor  # (B,) mean |o*|²
    scale: float

    @classmethod
    def split(cls, problems: Problems) -> tuple[Target, Target]:
        """The training target and the held-out target of fp32 `problems`."""
        out, lse = problems.teacher()
        # One norm for both parts, so that training and held-out losses are on one scale.
        out_norm = out.square().sum(-1).mean(-1).clamp_min(torch.finfo(out.dtype).tiny)
        train, held_out = (~problems.held_out).nonzero()[:, 0], problems.held_out.nonzero()[:, 0]

        def part(rows: Tensor) -> Target:
            return cls(
                problems.queries[:, rows],
                out[:, rows],
                lse[:, rows],
                problems.retained_lse[:, rows],
                problems.retained_out[:, rows],
                out_norm,
                problems.scale,
            )

        return part(train), part(held_out)

    def take(self, index: Tensor) -> Target:
        """The target of the problems in `index`."""
        return Target(
            self.queries[index],
            self.out[index],
            self.lse[index],
            self.retained_lse[index],
            self.retained_out[index],
            self.out_norm[index],
            self.scale,
        )

    def weights(self, keys: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax weights (B, Q, m) of compressed keys (B, m, D), of the retained entries (B, Q), and z (B, Q).

        `valid` (B, m) is False for padding, which gets weight 0.
        """
        logits = torch.bmm(self.queries, keys.transpose(1, 2)).mul_(self.scale)
        if valid is not None:
            logits.masked_fill_(~valid[:, None, :], -torch.inf)
        lse = torch.logaddexp(torch.logsumexp(logits, dim=-1), self.retained_lse)
        weights = logits.sub_(lse.unsqueeze(-1)).exp_()
        return weights, (self.retained_lse - lse).exp(), lse

    def loss(self, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """Loss (B,) of compressed pairs (B, m, D)."""
        weights, retained, lse = self.weights(keys, valid)
        out = torch.baddbmm(retained.unsqueeze(-1) * self.retained_out, weights, values)
        return self._loss(out - self.out, lse - self.lse)

    def loss_and_grad(self, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss (B,) and its gradient (B, m, D) with respect to the keys, the values being held fixed."""
        num_queries = self.queries.shape[1]
        weights, retained, lse = self.weights(keys, valid)
        out = torch.baddbmm(retained.unsqueeze(-1) * self.retained_out, weights, values)
        out_error, lse_error = out - self.out, lse - self.lse
        d_out = out_error * (2.0 / num_queries / self.out_norm)[:, None, None]
        d_lse = lse_error * (2.0 * LSE_WEIGHT / num_queries)
        # d loss / d logit_j = p_j (g·v_j - g·o + d_lse), the softmax with the retained entry in its denominator
        d_logits = torch.bmm(d_out, values.transpose(1, 2))
        d_logits.add_((d_lse - (d_out * out).sum(-1)).unsqueeze(-1)).mul_(weights)
        return self._loss(out_error, lse_error), torch.bmm(d_logits.transpose(1, 2), self.queries).mul_(self.scale)

    def _loss(self, out_error: Tensor, lse_error: Tensor) -> Tensor:
        return out_error.square().sum(-1).mean(-1) / self.out_norm + LSE_WEIGHT * lse_error.square().mean(-1)
