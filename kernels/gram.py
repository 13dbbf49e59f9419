"""The normal equations of the values' least squares, without storing the softmax weights.

With the weights ``p_qj = w_qj / M_q`` of `attention_loss` (w relative to the teacher's mass, M their sum and the
retained mass) and what the values V that are there leave over, ``e_q = o*_q - (Σ_j p_qj v_j + R_q / M_q)``::

    G = PᵀP (m, m)          h = Pᵀe (m, D)

so that ``V + (G + λ)⁻¹ h`` are the ridge values (KVSculpt, arXiv 2603.27819: closed-form values). One pass over keys
gives M and e; then each tile of G recomputes its weights from queries and keys. G is symmetric: tiles above the
diagonal are copies of those below.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsculpt_vllm.kernels.tiles import (
    TINY,
    attend_tile,
    check_problems,
    load_queries,
    load_rows,
    relative_weights,
    tiling,
    with_strides,
)


def gram_twin(
    queries: Tensor,
    shift: Tensor,
    out: Tensor,
    retained_mass: Tensor,
    retained_sum: Tensor,
    keys: Tensor,
    values: Tensor,
    sizes: Tensor,
) -> tuple[Tensor, Tensor]:
    """The formulas with a matrix of weights; see `gram`."""
    valid = torch.arange(keys.shape[1], device=keys.device) < sizes[:, None]
    weights = (queries @ keys.transpose(1, 2) - shift[..., None]).exp() * valid[:, None]
    mass = (weights.sum(-1) + retained_mass).clamp_min(TINY)
    weights = weights / mass[..., None]
    residual = out - weights @ values - retained_sum / mass[..., None]
    return weights.transpose(1, 2) @ weights, weights.transpose(1, 2) @ residual


def gram(
    queries: Tensor,  # (B, Q, D) scaled
    shift: Tensor,  # (B, Q) the teacher's log-sum-exp z*
    out: Tensor,  # (B, Q, D) the teacher's output o*
    retained_mass: Tensor,  # (B, Q) e^(z_r - z*)
    retained_sum: Tensor,  # (B, Q, D) retained mass times retained output
    keys: Tensor,  # (B, m, D)
    values: Tensor,  # (B, m, D) V
    sizes: Tensor,  # (B,) int, entries of each problem; rows and columns behind are 0
) -> tuple[Tensor, Tensor]:
    """G (B, m, m) and h (B, m, D), float32 as all that is given. Sums over queries run in a fixed order.

    Raises:
        ValueError: a shape, dtype, device or head size that does not fit.
    """
    batch, num_queries, head_size = queries.shape
    m = keys.shape[1]
    check_problems(queries, shift, out, retained_mass, retained_sum, keys, values, sizes)
    constants = tiling(head_size)
    mass = queries.new_empty(batch, num_queries)
    residual = queries.new_empty(batch, num_queries, head_size)
    _residual[(triton.cdiv(num_queries, constants["block_q"]), batch)](
        *with_strides(queries, shift, out, retained_mass, retained_sum, keys, values, mass, residual),
        sizes,
        num_queries,
        tiny=TINY,
        **constants,
    )
    blocks = triton.cdiv(m, constants["block_m"])
    system = queries.new_zeros(batch, m, m)
    right = queries.new_zeros(batch, m, head_size)
    _products[(blocks * (blocks + 1) // 2 + blocks, batch)](
        *with_strides(queries, shift, keys, mass, residual, system, right),
        sizes,
        num_queries,
        blocks,
        **constants,
    )
    return system, right


@triton.jit
def _residual(
    queries, queries_b, queries_q,
    shift, shift_b, shift_q,
    out, out_b, out_q,
    retained_mass, retained_mass_b, retained_mass_q,
    retained_sum, retained_sum_b, retained_sum_q,
    keys, keys_b, keys_m,
    values, values_b, values_m,
    mass_out, mass_b, mass_q,
    residual, residual_b, residual_q,
    sizes, num_queries,
    head_size: tl.constexpr, tiny: tl.constexpr,
    block_q: tl.constexpr, block_m: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    rows, d = tl.program_id(0) * block_q + tl.arange(0, block_q), tl.arange(0, block_d)
    inside = rows < num_queries
    q, z = load_queries(
        queries + b * queries_b, queries_q, shift + b * shift_b, shift_q, rows, num_queries, d, head_size
    )
    mass, given = attend_tile(
        q, z, keys + b * keys_b, keys_m, values + b * values_b, values_m,
        retained_mass + b * retained_mass_b, retained_mass_q, retained_sum + b * retained_sum_b, retained_sum_q,
        rows, num_queries, tl.load(sizes + b), d, tiny, "tf32x3", head_size, block_m,
    )  # fmt: skip
    left = load_rows(out + b * out_b, out_q, rows, num_queries, d, head_size) - given
    tl.store(mass_out + b * mass_b + rows * mass_q, mass, mask=inside)
    tl.store(
        residual + b * residual_b + rows[:, None] * residual_q + d[None, :],
        left,
        mask=inside[:, None] & (d[None, :] < head_size),
    )


@triton.jit
def _products(
    queries, queries_b, queries_q,
    shift, shift_b, shift_q,
    keys, keys_b, keys_m,
    mass, mass_b, mass_q,
    residual, residual_b, residual_q,
    system, system_b, system_m,
    right, right_b, right_m,
    sizes, num_queries, blocks,
    head_size: tl.constexpr,
    block_q: tl.constexpr, block_m: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """One tile of G at or below the diagonal, and its mirror image; the last `blocks` programs compute h."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, size = tl.arange(0, block_d), tl.load(sizes + b)
    triangle = blocks * (blocks + 1) // 2
    if tile < triangle:
        # Tile (i, j) with j <= i is number i (i + 1) / 2 + j; the square root may be off by one.
        i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
        j = tile - i * (i + 1) // 2
        down, across = i * block_m + tl.arange(0, block_m), j * block_m + tl.arange(0, block_m)
        if i * block_m < size:
            k_down = load_rows(keys + b * keys_b, keys_m, down, size, d, head_size)
            k_across = load_rows(keys + b * keys_b, keys_m, across, size, d, head_size)
            total = tl.zeros((block_m, block_m), tl.float32)
            for first in range(0, num_queries, block_q):
                rows = first + tl.arange(0, block_q)
                inside = rows < num_queries
                q, z = load_queries(
                    queries + b * queries_b, queries_q, shift + b * shift_b, shift_q, rows, num_queries, d, head_size
                )
                # A row beyond the last query weighs nothing.
                share = 1.0 / tl.load(mass + b * mass_b + rows * mass_q, mask=inside, other=float("inf"))
                p_down = relative_weights(q, k_down, z, down, size) * share[:, None]
                p_across = relative_weights(q, k_across, z, across, size) * share[:, None]
                total += tl.dot(tl.trans(p_down), p_across, input_precision="tf32x3")
            here = system + b * system_b
            known = (down[:, None] < size) & (across[None, :] < size)
            tl.store(here + down[:, None] * system_m + across[None, :], total, mask=known)
            if i != j:
                mirrored = (across[:, None] < size) & (down[None, :] < size)
                tl.store(here + across[:, None] * system_m + down[None, :], tl.trans(total), mask=mirrored)
    else:
        down = (tile - triangle) * block_m + tl.arange(0, block_m)
        if (tile - triangle) * block_m < size:
            k = load_rows(keys + b * keys_b, keys_m, down, size, d, head_size)
            product = tl.zeros((block_m, block_d), tl.float32)
            for first in range(0, num_queries, block_q):
                rows = first + tl.arange(0, block_q)
                inside = rows < num_queries
                q, z = load_queries(
                    queries + b * queries_b, queries_q, shift + b * shift_b, shift_q, rows, num_queries, d, head_size
                )
                share = 1.0 / tl.load(mass + b * mass_b + rows * mass_q, mask=inside, other=float("inf"))
                e = load_rows(residual + b * residual_b, residual_q, rows, num_queries, d, head_size)
                p = relative_weights(q, k, z, down, size) * share[:, None]
                product += tl.dot(tl.trans(p), e, input_precision="tf32x3")
            tl.store(
                right + b * right_b + down[:, None] * right_m + d[None, :],
                product,
                mask=(down[:, None] < size) & (d[None, :] < head_size),
            )
