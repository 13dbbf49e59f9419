"""Values in closed form: ridge least squares with the original values as the point to shrink towards."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.objective import Target


def fit_values(
    target: Target,
    keys: Tensor,  # (B, m, D)
    start: Tensor,  # (B, m, D) the values to shrink towards
    ridge: Tensor,  # (B,) relative to the mean diagonal of the Gram matrix
    valid: Tensor | None = None,  # (B, m)
) -> Tensor:
    """Values (B, m, D) minimising ``Σ_q |Σ_j p_j v_j + p_r o_r - o*|² + λ |v - start|²``, λ = ridge · mean diag.

    Shrinking towards zero instead of towards the start would make a little-used entry forget what it holds, which
    held-out queries punish (shared/algorithm.md, 2). Where there are fewer queries than entries the equivalent
    dual system is smaller and is solved instead.
    """
    weights, retained, _ = target.weights(keys, valid)  # (B, Q, m)
    residual = target.out - retained.unsqueeze(-1) * target.retained_out - torch.bmm(weights, start)
    num_queries, num_entries = weights.shape[1:]
    mean_diagonal = weights.square().sum((1, 2)) / num_entries
    # The floor keeps a head whose queries all look elsewhere (weights underflow) solvable: its values stay.
    penalty = (ridge * mean_diagonal).clamp_min(1e-12)
    transposed = weights.transpose(1, 2)
    if num_entries <= num_queries:
        gram = torch.bmm(transposed, weights)
        gram.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
        return start + _solve(gram, torch.bmm(transposed, residual))
    gram = torch.bmm(weights, transposed)
    gram.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
    return start + torch.bmm(transposed, _solve(gram, residual))


def _solve(gram: Tensor, rhs: Tensor) -> Tensor:
    """Solve symmetric positive definite systems; a system that fp32 cannot factor keeps its start (0 change)."""
    factor, info = torch.linalg.cholesky_ex(gram)
    failed = info != 0
    if failed.any():
        factor[failed] = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        rhs = rhs.masked_fill(failed[:, None, None], 0.0)
    return torch.cholesky_solve(rhs, factor)
