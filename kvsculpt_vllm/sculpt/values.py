"""Values in closed form: ridge least squares with the original values as the point to shrink towards."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsculpt_vllm.kernels.dispatch import use_triton
from kvsculpt_vllm.sculpt.objective import Target

JITTER = (1e1, 1e2, 1e3)
"""By what the ridge is multiplied, one after the other, where the system could not be factored."""


class ValueFit:
    """The least-squares problem of the values for fixed keys; the Gram matrix serves any number of ridges.

    `solve` gives the values (B, m, D) minimising ``Σ_q |Σ_j p_j v_j + p_r o_r - o*|² + λ |v - start|²`` with
    λ = ridge · mean diagonal of the Gram matrix. Shrinking towards zero instead of towards the start would make a
    little-used entry forget what it holds, which held-out queries punish (docs/algorithm.md#values). Where there are
    fewer queries than entries the equivalent dual system is smaller and is solved instead.
    """

    def __init__(
        self,
        target: Target,
        keys: Tensor,  # (B, m, D)
        start: Tensor,  # (B, m, D) the values to shrink towards
        valid: Tensor | None = None,  # (B, m), False for padding
    ) -> None:
        num_queries, num_entries = target.probes.shape[1], keys.shape[1]
        self._start, self._dual = start, num_entries > num_queries
        if use_triton(keys) and not self._dual:
            self._gram, self._rhs = target.gram(keys, start, valid)
        else:
            weights, retained_out = target.normalised_weights(keys, valid)  # (B, Q, m), (B, Q, D)
            residual = target.out - retained_out - torch.bmm(weights, start)
            self._transposed = weights.transpose(1, 2)
            pair = (weights, self._transposed) if self._dual else (self._transposed, weights)
            self._gram = torch.bmm(*pair)
            self._rhs = residual if self._dual else torch.bmm(self._transposed, residual)
        # Over the real entries only: the ridge of a problem must not depend on what it is padded to.
        num_valid = num_entries if valid is None else valid.sum(1)
        self._mean_diagonal = self._gram.diagonal(dim1=1, dim2=2).sum(1) / num_valid
        self.failed = torch.zeros(len(keys), dtype=torch.long, device=keys.device)  # (B,) solves that kept the start

    def solve(self, ridge: Tensor) -> Tensor:
        """Values (B, m, D) for `ridge` (B,).

        A system that fp32 cannot factor is tried again with the stronger ridges of `JITTER`; what none of them
        helps, which only numbers that are not finite bring about, keeps its start and is counted in `failed`.
        """
        factor, unsolved = self._factor(ridge)
        for more in JITTER:
            if not unsolved.any():
                break
            again, still = self._factor(torch.where(unsolved, ridge * more, ridge))
            factor = torch.where(unsolved[:, None, None], again, factor)
            unsolved = still
        # Whatever stands in a factor that failed: a problem is solved alone, and its change is dropped below.
        change = torch.cholesky_solve(self._rhs, factor)
        if self._dual:
            change = torch.bmm(self._transposed, change)
        unsolved |= ~change.isfinite().flatten(1).all(1)
        self.failed += unsolved
        return self._start + change.masked_fill(unsolved[:, None, None], 0.0)

    def _factor(self, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """The Cholesky factors of the systems with `ridge` (B,), and which could not be factored (B,)."""
        # The floor keeps a head whose queries all look elsewhere (weights underflow) solvable: its values stay.
        penalty = (ridge * self._mean_diagonal).clamp_min(1e-12)
        system = self._gram.clone()
        system.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
        factor, info = torch.linalg.cholesky_ex(system)
        return factor, info != 0


def fit_values(target: Target, keys: Tensor, start: Tensor, ridge: Tensor, valid: Tensor | None = None) -> Tensor:
    """One `ValueFit`, solved once."""
    return ValueFit(target, keys, start, valid).solve(ridge)
