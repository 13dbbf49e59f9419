"""How far a set of compressed entries is from the full cache, and the gradient with respect to the keys."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from kvsculpt_vllm.kernels.attention_loss import attention_loss
from kvsculpt_vllm.kernels.dispatch import use_triton
from kvsculpt_vllm.kernels.soft_cap import capped, slope_at
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.transfer import on_device

LSE_WEIGHT = 1.0
"""Weight of the log-sum-exp term. Both terms are relative (a squared logit error is a squared relative mass error)."""

FOREIGN_WEIGHT = 0.1
"""How much it counts that a key moves far where no query of the prompt looks, see `Target.foreign_weight`."""

MASKED_LOGIT = -1e30
"""Logit of padding; finite, so that it can go through a matrix product."""


KernelArguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""What `attention_loss` takes, up to the sizes."""


@dataclass(frozen=True)
class Target:
    """What B problems are measured against, on one subset of their queries.

    The loss of a problem is, averaged over its queries,
    ``|o - o*|² / mean|o*|² + LSE_WEIGHT (z - z*)²`` (KVSculpt: output MSE + log-sum-exp MSE), o and z being the
    softmax over compressed and retained entries together.

    Weights are taken relative to the teacher's own mass e^z*, so their sum's logarithm *is* z - z*, and no maximum
    has to be found. The shift, the padding mask and the sum each ride along in a matrix product as one more column:
    evaluating costs two products and one exponential, the gradient two more products and one multiplication.

    Under a soft cap the logits are a product of their own, and only shift and mask ride along in another.
    """

    probes: Tensor  # (B, Q, D + 2): scaled queries, -z*, 1
    out: Tensor  # (B, Q, D) o*
    retained_mass: Tensor  # (B, Q, 1) e^(z_r - z*)
    retained_sum: Tensor  # (B, Q, D) retained mass times retained output
    out_norm: Tensor  # (B,) mean |o*|²
    key_spread: Tensor  # (B,) mean |k - mean k|² over the span's keys
    soft_cap: float | None = None  # of the logits

    @classmethod
    def split(cls, problems: Problems, out: Tensor, lse: Tensor) -> tuple[Target, Target]:
        """The training target and the held-out target of fp32 `problems` with teacher `out` (B, Q, D), `lse` (B, Q)."""
        # One norm for both parts, so that training and held-out losses are on one scale.
        out_norm = out.square().sum(-1).mean(-1).clamp_min(torch.finfo(out.dtype).tiny)

        keys = problems.keys
        spread = (keys - keys.mean(1, keepdim=True)).square().sum(-1).mean(-1)
        key_spread = spread.clamp_min(torch.finfo(out.dtype).tiny)

        def part(mask: Tensor) -> Target:
            rows = on_device(mask.nonzero()[:, 0], lse.device)
            shift = lse[:, rows].unsqueeze(-1)
            mass = (problems.retained_lse[:, rows].unsqueeze(-1) - shift).exp()
            return cls(
                probes=torch.cat(
                    [problems.queries[:, rows].mul_(problems.scale), -shift, torch.ones_like(shift)], dim=-1
                ),
                out=out[:, rows],
                retained_mass=mass,
                retained_sum=problems.retained_out[:, rows].mul_(mass),
                out_norm=out_norm,
                key_spread=key_spread,
                soft_cap=problems.soft_cap,
            )

        return part(~problems.held_out), part(problems.held_out)

    @property
    def scaled_queries(self) -> Tensor:
        """Queries times the softmax scale (B, Q, D)."""
        return self.probes[..., :-2]

    @property
    def foreign_weight(self) -> Tensor:
        """Weight (B,) of |δ|² for a move δ of a key: what it may cost with queries that the prompt does not ask.

        A prompt that repeats itself asks nearly the same queries everywhere, held-out ones included. Along directions
        in which none of them looks, or all look alike, keys could move any distance at no loss, while the answer's own
        queries, which look elsewhere or are ten times as long, would see any logit. Of such a foreign query only this
        is assumed: its logits spread over the span's keys by some σ. A move that has nothing to do with the keys then
        changes a logit by about σ |δ| / √key_spread. With σ = 2.5, usual for a head, and one query in 60 foreign, that
        is 0.1 |δ|² / key_spread in the mean square.

        Ordinary prompts hardly notice: what gives a logit of 1 has 0.1 times the length of the keys' spread there, and
        4 times (in some heads 60 times) where one token repeats. Held-out queries then see what is given up, so that
        the error is honest again (benchmarks/LOG.md, 2026-11-25).
        """
        return FOREIGN_WEIGHT / self.key_spread

    def take(self, index: Tensor) -> Target:
        """The target of the problems in `index`."""
        tensors = [field.name for field in fields(self) if field.name != "soft_cap"]
        return Target(**{name: getattr(self, name)[index] for name in tensors}, soft_cap=self.soft_cap)

    def weights(self, keys: Tensor, valid: Tensor | None) -> Tensor:
        """Unnormalised weights e^(logit - z*) (B, Q, m) of keys (B, m, D); 0 for padding (`valid` (B, m) False)."""
        if self.soft_cap is not None:
            return self._relative(self._capped_logits(keys, self.soft_cap), keys, valid)
        return torch.bmm(self.probes, _with_shift_and_mask(keys, valid).transpose(1, 2)).exp_()

    def steepness(self, keys: Tensor, weights: Tensor) -> Tensor | None:
        """How much the logits of each key (B, m, 1) change where the key does: the slope of the cap, the mean over
        queries by their squared `weights` (B, Q, m). None without a cap.
        """
        if self.soft_cap is None:
            return None
        total = weights.square().sum(1).clamp_min_(torch.finfo(weights.dtype).tiny)
        slope = slope_at(self._capped_logits(keys, self.soft_cap), self.soft_cap)
        return (slope.mul_(weights).mul_(weights).sum(1) / total).unsqueeze(-1)

    def _capped_logits(self, keys: Tensor, soft_cap: float) -> Tensor:
        """Logits (B, Q, m) of keys. What a key has behind its D elements, as a bias of the evaluation's, is not under
        the cap: see `_relative`.
        """
        size = self.out.shape[-1]
        return capped(torch.bmm(self.probes[..., :size], keys[..., :size].transpose(1, 2)), soft_cap)

    def _relative(self, logits: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
        """Make of the logits under the cap (B, Q, m), in place, the weights of `keys`."""
        size = self.out.shape[-1]
        rest = _with_shift_and_mask(keys, valid)[..., size:]
        return logits.baddbmm_(self.probes[..., size:], rest.transpose(1, 2)).exp_()

    def normalise(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Make of `weights` (B, Q, m), in place, the softmax weights of the compressed entries; returns them, and what
        the retained ones add to the output (B, Q, D).
        """
        mass = self._mass(weights.sum(-1, keepdim=True))
        return weights.div_(mass), self.retained_sum / mass

    def loss(self, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """Loss (B,) of compressed pairs (B, m, D); a non-finite one means that the pairs are unusable."""
        if use_triton(keys):
            return attention_loss(*self._for_kernel(keys, values, valid), LSE_WEIGHT, False, self.soft_cap)[0]
        out, mass = self._attend(self.weights(keys, valid), with_ones(values))
        return self._loss(out - self.out, mass.log())

    def loss_and_grad(self, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss (B,) and its gradient (B, m, D) with respect to the keys, the values being held fixed."""
        if use_triton(keys):
            loss, grad = attention_loss(*self._for_kernel(keys, values, valid), LSE_WEIGHT, soft_cap=self.soft_cap)
            assert grad is not None  # as it was asked for
            return loss, grad
        num_queries = self.probes.shape[1]
        if self.soft_cap is None:
            weights, slope = self.weights(keys, valid), None
        else:
            logits = self._capped_logits(keys, self.soft_cap)
            slope = slope_at(logits, self.soft_cap)
            weights = self._relative(logits, keys, valid)
        values = with_ones(values)
        out, mass = self._attend(weights, values)
        out_error, lse_error = out - self.out, mass.log()
        d_out = out_error * (2.0 / num_queries / self.out_norm)[:, None, None]
        d_lse = lse_error * (2.0 * LSE_WEIGHT / num_queries)
        # d loss / d logit_j = p_j (g·v_j - g·o + d_lse), the softmax with the retained entry in its denominator
        pull = torch.cat([d_out, d_lse - (d_out * out).sum(-1, keepdim=True)], dim=-1) / mass
        d_logits = weights.mul_(torch.bmm(pull, values.transpose(1, 2)))
        if slope is not None:
            d_logits.mul_(slope)
        return self._loss(out_error, lse_error), torch.bmm(d_logits.transpose(1, 2), self.scaled_queries)

    def losses(self, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """Losses (R, B) of `values` (R, B, m, D), R candidates for each problem's keys (B, m, D): weights are computed
        once for all of them.
        """
        number, _, _, width = values.shape
        columns = values.permute(1, 2, 0, 3).flatten(2)  # (B, m, R·D): one product for all
        both = torch.bmm(self.weights(keys, valid), with_ones(columns))
        mass = self._mass(both[..., -1:]).unsqueeze(2)  # (B, Q, 1, 1)
        out = both[..., :-1].unflatten(2, (number, width))  # (B, Q, R, D)
        out_error = out.add_(self.retained_sum.unsqueeze(2)).div_(mass).sub_(self.out.unsqueeze(2))
        return self._loss(out_error.transpose(1, 2), mass.log().transpose(1, 2)).T

    @cached_property
    def _of_kernel(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, Q, D), shift z* (B, Q) and retained mass (B, Q) as kernels load them fast: contiguous."""
        shift = self.probes[..., -2].neg().contiguous()
        return self.scaled_queries.contiguous(), shift, self.retained_mass[..., 0].contiguous()

    def _for_kernel(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> KernelArguments:
        """The arguments of `attention_loss`."""
        sizes = keys.new_full((len(keys),), keys.shape[1], dtype=torch.long) if valid is None else valid.sum(1)
        queries, shift, mass = self._of_kernel
        return queries, shift, self.out, mass, self.retained_sum, self.out_norm, keys, values, sizes

    def _attend(self, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, Q, D) and mass e^(z - z*) (B, Q, 1), from values with their column of ones."""
        both = torch.bmm(weights, values)
        mass = self._mass(both[..., -1:])
        return (both[..., :-1] + self.retained_sum) / mass, mass

    def _mass(self, compressed: Tensor) -> Tensor:
        mass = compressed + self.retained_mass
        # A query whose every weight underflows gets a huge but finite log-sum-exp error.
        return mass.clamp_min(torch.finfo(mass.dtype).tiny)

    def _loss(self, out_error: Tensor, lse_error: Tensor) -> Tensor:
        """Loss (B,) of errors (B, Q, D) and (B, Q, 1); with one more dimension behind the first, (B, R)."""
        output = out_error.square().sum(-1).mean(-1)
        norm = self.out_norm if output.dim() == 1 else self.out_norm.unsqueeze(1)
        return output / norm + LSE_WEIGHT * lse_error.squeeze(-1).square().mean(-1)


def _with_shift_and_mask(keys: Tensor, valid: Tensor | None) -> Tensor:
    """Keys (B, m, D) and what the last two columns of `Target.probes` are multiplied with: 1, and the mask."""
    ones = torch.ones_like(keys[..., :1])
    mask = torch.zeros_like(ones) if valid is None else (~valid).unsqueeze(-1) * MASKED_LOGIT
    return torch.cat([keys, ones, mask], dim=-1)


def with_ones(values: Tensor) -> Tensor:
    """Values (B, m, D) with a column of ones: in a product with weights it sums them."""
    return torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
