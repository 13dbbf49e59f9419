"""Loss of compressed key/value pairs and its gradient in the keys, for a batch of ragged problems.

With logits ``s_qj = q·k_j`` (queries come scaled), or ``c tanh(q·k_j / c)`` under a soft cap c, weights relative to the
teacher's mass ``w_qj = e^(s_qj - z*_q)``, and the retained entries' mass ``r_q`` and weighted sum ``R_q`` on the same
scale (KVSculpt, arXiv 2603.27819: output MSE + log-sum-exp MSE over compressed and retained entries together)::

    M_q = Σ_j w_qj + r_q          o_q = (Σ_j w_qj v_j + R_q) / M_q
    loss = mean_q |o_q - o*_q|² / norm + λ mean_q (log M_q)²
    dloss/dk_j = Σ_q w_qj (a_q·v_j + c_q) t_qj q,    t_qj = 1, or 1 - tanh²(q·k_j / c)
                                                a_q = 2 (o_q - o*_q) / (Q norm M_q)
                                                c_q = 2 λ log M_q / (Q M_q) - a_q·o_q

Two passes, both streaming: by blocks of queries for `M`, `o`, `a`, `c`, and by blocks of keys for the gradient. No
matrix of weights is stored, and no atomic addition is made, so that equal input gives equal output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsculpt_vllm.kernels.checks import check_tensors
from kvsculpt_vllm.kernels.soft_cap import capped, slope_at, slope_tile
from kvsculpt_vllm.kernels.tiles import (
    TINY,
    attend_tile,
    check_problems,
    load_queries,
    load_rows,
    logits_of,
    relative_weights,
    tiling,
    with_strides,
)


def attention_loss_twin(
    queries: Tensor,
    shift: Tensor,
    out: Tensor,
    retained_mass: Tensor,
    retained_sum: Tensor,
    out_norm: Tensor,
    keys: Tensor,
    values: Tensor,
    sizes: Tensor,
    lse_weight: float,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The formulas with a matrix of weights; see `attention_loss`."""
    num_queries = queries.shape[1]
    valid = torch.arange(keys.shape[1], device=keys.device) < sizes[:, None]
    logits = capped(queries @ keys.transpose(1, 2), soft_cap)
    weights = (logits - shift[..., None]).exp() * valid[:, None]
    mass = (weights.sum(-1) + retained_mass).clamp_min(TINY)
    given = (weights @ values + retained_sum) / mass[..., None]
    error, lse_error = given - out, mass.log()
    loss = error.square().sum(-1).mean(-1) / out_norm + lse_weight * lse_error.square().mean(-1)
    a = 2 * error / (num_queries * out_norm[:, None, None] * mass[..., None])
    c = 2 * lse_weight * lse_error / (num_queries * mass) - (a * given).sum(-1)
    pull = weights * (a @ values.transpose(1, 2) + c[..., None])
    if soft_cap is not None:
        pull = pull * slope_at(logits, soft_cap)
    return loss, pull.transpose(1, 2) @ queries


def attention_loss(
    queries: Tensor,  # (B, Q, D) scaled
    shift: Tensor,  # (B, Q) the teacher's log-sum-exp z*
    out: Tensor,  # (B, Q, D) the teacher's output o*
    retained_mass: Tensor,  # (B, Q) e^(z_r - z*)
    retained_sum: Tensor,  # (B, Q, D) retained mass times retained output
    out_norm: Tensor,  # (B,) what squared output errors are divided by
    keys: Tensor,  # (B, m, D)
    values: Tensor,  # (B, m, D)
    sizes: Tensor,  # (B,) int, entries of each problem; those behind are neither read nor given a gradient
    lse_weight: float = 1.0,
    with_grad: bool = True,
    soft_cap: float | None = None,  # of the logits
) -> tuple[Tensor, Tensor | None]:
    """Loss (B,) and its gradient in the keys (B, m, D), 0 for padding, None without `with_grad`.

    All tensors are float32 and may have any strides. Logits are computed with three TF32 products each (nearly
    float32: an error of a logit is an error of a weight), the rest with one.

    Raises:
        ValueError: a shape, dtype, device or head size that does not fit.
    """
    batch, num_queries, head_size = queries.shape
    m = keys.shape[1]
    check_problems(queries, shift, out, retained_mass, retained_sum, keys, values, sizes)
    check_tensors(queries, torch.float32, out_norm=(out_norm, (batch,)))
    constants = tiling(head_size, queries.device, streams_entries=True)
    blocks = triton.cdiv(num_queries, constants["block_q"])
    partial = queries.new_empty(batch, blocks)
    pull = queries.new_empty(batch, num_queries, head_size)  # a
    push = queries.new_empty(batch, num_queries)  # c
    _forward[(blocks, batch)](
        *with_strides(queries, shift, out, retained_mass, retained_sum, keys, values, pull, push),
        out_norm,
        sizes,
        partial,
        num_queries,
        lse_weight,
        tiny=TINY,
        soft_cap=soft_cap,
        **constants,
    )
    loss = partial.sum(1) / num_queries
    if not with_grad:
        return loss, None
    grad = torch.zeros_like(keys, memory_format=torch.contiguous_format)
    constants = tiling(head_size, queries.device, streams_entries=False)
    _backward[(triton.cdiv(m, constants["block_m"]), batch)](
        *with_strides(queries, shift, keys, values, pull, push, grad),
        sizes,
        num_queries,
        soft_cap=soft_cap,
        **constants,
    )
    return loss, grad


@triton.jit(do_not_specialize=["shift_b", "retained_mass_b", "push_b", "num_queries"])
def _forward(
    queries, queries_b, queries_q,
    shift, shift_b, shift_q,
    out, out_b, out_q,
    retained_mass, retained_mass_b, retained_mass_q,
    retained_sum, retained_sum_b, retained_sum_q,
    keys, keys_b, keys_m,
    values, values_b, values_m,
    pull, pull_b, pull_q,
    push, push_b, push_q,
    out_norm, sizes, partial,
    num_queries, lse_weight,
    head_size: tl.constexpr, tiny: tl.constexpr, soft_cap: tl.constexpr,
    block_q: tl.constexpr, block_m: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    block, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, d = block * block_q + tl.arange(0, block_q), tl.arange(0, block_d)
    inside = rows < num_queries
    q, z = load_queries(
        queries + b * queries_b, queries_q, shift + b * shift_b, shift_q, rows, num_queries, d, head_size
    )
    mass, given = attend_tile(
        q, z, keys + b * keys_b, keys_m, values + b * values_b, values_m,
        retained_mass + b * retained_mass_b, retained_mass_q, retained_sum + b * retained_sum_b, retained_sum_q,
        rows, num_queries, tl.load(sizes + b), d, tiny, head_size, block_m, soft_cap,
    )  # fmt: skip
    error = given - load_rows(out + b * out_b, out_q, rows, num_queries, d, head_size)
    norm, lse_error = tl.load(out_norm + b), tl.log(mass)
    each = tl.sum(error * error, 1) / norm + lse_weight * lse_error * lse_error
    tl.store(partial + b * tl.num_programs(0) + block, tl.sum(tl.where(inside, each, 0.0), 0))
    a = error * (2.0 / (num_queries * norm * mass))[:, None]
    c = 2.0 * lse_weight * lse_error / (num_queries * mass) - tl.sum(a * given, 1)
    tl.store(
        pull + b * pull_b + rows[:, None] * pull_q + d[None, :], a, mask=inside[:, None] & (d[None, :] < head_size)
    )
    tl.store(push + b * push_b + rows * push_q, c, mask=inside)


@triton.jit(do_not_specialize=["shift_b", "push_b", "num_queries"])
def _backward(
    queries, queries_b, queries_q,
    shift, shift_b, shift_q,
    keys, keys_b, keys_m,
    values, values_b, values_m,
    pull, pull_b, pull_q,
    push, push_b, push_q,
    grad, grad_b, grad_m,
    sizes, num_queries,
    head_size: tl.constexpr, soft_cap: tl.constexpr,
    block_q: tl.constexpr, block_m: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    columns, d = tl.program_id(0) * block_m + tl.arange(0, block_m), tl.arange(0, block_d)
    size = tl.load(sizes + b)
    if tl.program_id(0) * block_m < size:
        k = load_rows(keys + b * keys_b, keys_m, columns, size, d, head_size)
        v = load_rows(values + b * values_b, values_m, columns, size, d, head_size)
        gradient = tl.zeros((block_m, block_d), tl.float32)
        for first in range(0, num_queries, block_q):
            rows = first + tl.arange(0, block_q)
            inside = rows < num_queries
            q, z = load_queries(
                queries + b * queries_b, queries_q, shift + b * shift_b, shift_q, rows, num_queries, d, head_size
            )
            a = load_rows(pull + b * pull_b, pull_q, rows, num_queries, d, head_size)
            c = tl.load(push + b * push_b + rows * push_q, mask=inside, other=0.0)
            logits = logits_of(q, k, soft_cap)
            w = relative_weights(logits, z, columns, size)
            w *= tl.dot(a, tl.trans(v), input_precision="tf32") + c[:, None]
            if soft_cap is not None:
                w *= slope_tile(logits, soft_cap)
            gradient += tl.dot(tl.trans(w), q, input_precision="tf32")
        tl.store(
            grad + b * grad_b + columns[:, None] * grad_m + d[None, :],
            gradient,
            mask=(columns[:, None] < size) & (d[None, :] < head_size),
        )
