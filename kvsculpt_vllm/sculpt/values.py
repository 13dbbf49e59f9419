"""Values in closed form: ridge least squares with the original values as the point to shrink towards."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.objective import Target


class ValueFit:
    """The least-squares problem of the values for fixed keys; the Gram matrix serves any number of ridges.

    `solve` gives the values (B, m, D) minimising ``Σ_q |Σ_j p_j v_j + p_r o_r - o*|² + λ |v - start|²`` with
    λ = ridge · mean diagonal of the Gram matrix. Shrinking towards zero instead of towards the start would make a
    little-used entry forget what it holds, which held-out queries punish (shared/algorithm.md, 2). Where there are
    fewer queries than entries the equivalent dual system is smaller and is solved instead.
    """

    def __init__(
        self,
        target: Target,
        keys: Tensor,  # (B, m, D)
        start: Tensor,  # (B, m, D) the values to shrink towards
        valid: Tensor | None = None,  # (B, m), False for padding
    ) -> None:
        weights, retained_out = target.normalised_weights(keys, valid)  # (B, Q, m), (B, Q, D)
        num_queries, num_entries = weights.shape[1:]
        residual = target.out - retained_out - torch.bmm(weights, start)
        transposed = weights.transpose(1, 2)
        self._start = start
        self._dual = num_entries > num_queries
        self._transposed = transposed
        self._gram = torch.bmm(weights, transposed) if self._dual else torch.bmm(transposed, weights)
        self._rhs = residual if self._dual else torch.bmm(transposed, residual)
        # Over the real entries only: the ridge of a problem must not depend on what it is padded to.
        num_valid = num_entries if valid is None else valid.sum(1)
        self._mean_diagonal = self._gram.diagonal(dim1=1, dim2=2).sum(1) / num_valid

    def solve(self, ridge: Tensor) -> Tensor:
        """Values (B, m, D) for `ridge` (B,). A system that fp32 cannot factor keeps its start."""
        # The floor keeps a head whose queries all look elsewhere (weights underflow) solvable: its values stay.
        penalty = (ridge * self._mean_diagonal).clamp_min(1e-12)
        system = self._gram.clone()
        system.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
        factor, info = torch.linalg.cholesky_ex(system)
        failed = (info != 0)[:, None, None]
        identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        factor = torch.where(failed, identity, factor)
        change = torch.cholesky_solve(self._rhs.masked_fill(failed, 0.0), factor)
        return self._start + (torch.bmm(self._transposed, change) if self._dual else change)


def fit_values(target: Target, keys: Tensor, start: Tensor, ridge: Tensor, valid: Tensor | None = None) -> Tensor:
    """One `ValueFit`, solved once."""
    return ValueFit(target, keys, start, valid).solve(ridge)
