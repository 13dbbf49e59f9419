"""Values in closed form: ridge least squares with the original values as the point to shrink towards."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.matmul import rounded_products, solved_by
from kvsculpt_vllm.sculpt.memory import max_elements
from kvsculpt_vllm.sculpt.objective import Target

STRONGER = 1e3
"""By what the ridge of a system that could not be factored is multiplied."""


class ValueFit:
    """The least-squares problem of the values for fixed keys; the Gram matrix serves any number of ridges.

    It gives the values (B, m, D) minimising ``Σ_q |Σ_j p_j v_j + p_r o_r - o*|² + λ |v - start|²`` with
    λ = ridge · mean diagonal of the Gram matrix. Shrinking towards zero instead of towards the start would make a
    little-used entry forget what it holds, which held-out queries punish (docs/algorithm.md#values). Where there are
    fewer queries than entries the equivalent dual system is smaller and is solved instead.

    What cannot be solved with any ridge, which only numbers that are not finite bring about, is counted in `failed`.
    Nobody waits to know which those are: a stronger ridge is always solved along.
    """

    def __init__(
        self,
        target: Target,
        keys: Tensor,  # (B, m, D)
        start: Tensor,  # (B, m, D) the values to shrink towards
        valid: Tensor | None = None,  # (B, m), False for padding
        weights: Tensor | None = None,  # `target.weights(keys, valid)` if they are there; they are written over
    ) -> None:
        num_queries, num_entries = target.probes.shape[1], keys.shape[1]
        self._start, self._dual = start, num_entries > num_queries
        weights, retained_out = target.normalise(target.weights(keys, valid) if weights is None else weights)
        residual = target.out - retained_out - torch.bmm(weights, start)
        transposed = weights.transpose(1, 2)
        with rounded_products(weights.device):
            self._gram = torch.bmm(weights, transposed) if self._dual else torch.bmm(transposed, weights)
            self._rhs = residual if self._dual else torch.bmm(transposed, residual)
        self._transposed = transposed if self._dual else None
        # Over the real entries only: the ridge of a problem must not depend on what it is padded to.
        num_valid = num_entries if valid is None else valid.sum(1)
        self._mean_diagonal = self._gram.diagonal(dim1=1, dim2=2).sum(1) / num_valid
        self.failed = torch.zeros(len(keys), dtype=torch.long, device=keys.device)  # (B,) solves that no ridge helped

    def solve(self, ridge: Tensor) -> Tensor:
        """Values (B, m, D) for `ridge` (B,). A system that fp32 cannot factor is solved with a ridge that is
        `STRONGER`; what that does not help keeps its start.
        """
        changes, solved = self._changes(torch.stack([ridge, STRONGER * ridge]))
        change = torch.where(solved[0, :, None, None], changes[0], changes[1])
        unsolved = ~solved.any(0)
        self.failed += unsolved
        return change.masked_fill_(unsolved[:, None, None], 0.0).add_(self._start)

    def solve_each(self, ridges: Tensor) -> Tensor:
        """Values (R, B, m, D) for each of `ridges` (R,). What fp32 cannot factor is NaN: other ridges do."""
        changes, solved = self._changes(ridges[:, None].expand(-1, len(self._gram)))
        self.failed += len(ridges) * ~solved.any(0)
        return changes.masked_fill_(~solved[..., None, None], torch.nan).add_(self._start)

    def _changes(self, ridges: Tensor) -> tuple[Tensor, Tensor]:
        """Changes (R, B, m, D) of the values with each of `ridges` (R, B), and which (R, B) could be solved."""
        at_once = max(1, max_elements(self._gram.device) // self._gram.numel())
        parts = [self._solve(some) for some in ridges.split(at_once)]
        changes, solved = (torch.cat(each) if len(parts) > 1 else each[0] for each in zip(*parts, strict=True))
        return changes, solved

    def _solve(self, ridges: Tensor) -> tuple[Tensor, Tensor]:
        """Changes (R, B, m, D) with `ridges` (R, B), each by a factorisation of its own, and whether that went well.

        All are one batch: a GPU takes about as long for one small matrix as for many.
        """
        # The floor keeps a head whose queries all look elsewhere (weights underflow) solvable: its values stay.
        penalty = (ridges * self._mean_diagonal).clamp_min(1e-12)
        systems = self._gram.repeat(len(ridges), 1, 1, 1)
        systems.diagonal(dim1=2, dim2=3).add_(penalty.unsqueeze(2))
        factors, info = torch.linalg.cholesky_ex(systems)
        del systems
        # Whatever stands in a factor that failed: a problem is solved alone, and its change is dropped.
        changes = solved_by(factors, self._rhs.expand(len(ridges), -1, -1, -1))
        if self._transposed is not None:
            columns = torch.bmm(self._transposed, changes.permute(1, 2, 0, 3).flatten(2))  # (B, m, R·D)
            changes = columns.unflatten(2, (len(ridges), -1)).permute(2, 0, 1, 3)
        largest = torch.linalg.vector_norm(changes, torch.inf, dim=(2, 3))  # NaN if one is
        return changes, (info == 0) & (largest < torch.inf)


def fit_values(target: Target, keys: Tensor, start: Tensor, ridge: Tensor, valid: Tensor | None = None) -> Tensor:
    """One `ValueFit`, solved once."""
    return ValueFit(target, keys, start, valid).solve(ridge)
