"""What the full cache answers, and how much attention every entry receives; both stream over the other side.

With logits ``s_qj = q·k_j`` (queries come scaled), or ``c tanh(q·k_j / c)`` under a soft cap c::

    attention_with_lse:    z_q = log Σ_j e^(s_qj)            o_q = Σ_j e^(s_qj - z_q) v_j
    received:  a_j = Σ_q e^(power (s_qj - z_q))

``received`` with power 1 is the accumulated attention of H2O and KVSculpt (arXiv 2603.27819), with power 2 the square
of Attention Matching's root mean square (arXiv 2602.16284), when z is the log-sum-exp over everything a query sees.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsculpt_vllm.kernels.checks import check_head_size, check_tensors
from kvsculpt_vllm.kernels.soft_cap import capped
from kvsculpt_vllm.kernels.tiles import load_rows, logits_of, tiling, with_strides


def attention_with_lse_twin(
    queries: Tensor, keys: Tensor, values: Tensor, soft_cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """See `attention_with_lse`."""
    logits = capped(queries @ keys.transpose(1, 2), soft_cap)
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


def received_twin(queries: Tensor, lse: Tensor, keys: Tensor, power: int, soft_cap: float | None = None) -> Tensor:
    """See `received`."""
    return (power * (capped(queries @ keys.transpose(1, 2), soft_cap) - lse[..., None])).exp().sum(1)


def attention_with_lse(
    queries: Tensor,  # (B, Q, D) scaled
    keys: Tensor,  # (B, n, D)
    values: Tensor,  # (B, n, D)
    soft_cap: float | None = None,  # of the logits
) -> tuple[Tensor, Tensor]:
    """Attention (B, Q, D) over all keys and its log-sum-exp (B, Q), float32 as all that is given.

    Raises:
        ValueError: a shape, dtype, device or head size that does not fit, or no key.
    """
    batch, num_queries, head_size = queries.shape
    n = keys.shape[1]
    check_head_size(head_size)
    check_tensors(
        queries,
        torch.float32,
        queries=(queries, (batch, num_queries, head_size)),
        keys=(keys, (batch, n, head_size)),
        values=(values, (batch, n, head_size)),
    )
    if n == 0:
        raise ValueError("keys: none given, at least one is needed")
    constants = tiling(head_size, queries.device, streams_entries=True)
    out, lse = torch.empty_like(queries, memory_format=torch.contiguous_format), queries.new_empty(batch, num_queries)
    _attend[(triton.cdiv(num_queries, constants["block_q"]), batch)](
        *with_strides(queries, keys, values, out, lse),
        num_queries,
        n,
        soft_cap=soft_cap,
        **constants,
    )
    return out, lse


def received(
    queries: Tensor,  # (B, Q, D) scaled
    lse: Tensor,  # (B, Q) log-sum-exp over everything that each query sees
    keys: Tensor,  # (B, n, D)
    power: int,
    soft_cap: float | None = None,  # of the logits
) -> Tensor:
    """Sum over queries the attention that each key receives, to the `power` (B, n); float32 as all that is given.

    Raises:
        ValueError: a shape, dtype, device or head size that does not fit, or a power below 1.
    """
    batch, num_queries, head_size = queries.shape
    n = keys.shape[1]
    check_head_size(head_size)
    check_tensors(
        queries,
        torch.float32,
        queries=(queries, (batch, num_queries, head_size)),
        lse=(lse, (batch, num_queries)),
        keys=(keys, (batch, n, head_size)),
    )
    if power < 1:
        raise ValueError(f"power: {power} given, at least 1 is needed")
    constants = tiling(head_size, queries.device, streams_entries=False)
    scores = queries.new_empty(batch, n)
    _received[(triton.cdiv(n, constants["block_m"]), batch)](
        *with_strides(queries, lse, keys, scores),
        num_queries,
        n,
        power,
        soft_cap=soft_cap,
        **constants,
    )
    return scores


@triton.jit(do_not_specialize=["lse_b", "num_queries", "n"])
def _attend(
    queries, queries_b, queries_q,
    keys, keys_b, keys_m,
    values, values_b, values_m,
    out, out_b, out_q,
    lse, lse_b, lse_q,
    num_queries, n,
    head_size: tl.constexpr, soft_cap: tl.constexpr,
    block_q: tl.constexpr, block_m: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    rows, d = tl.program_id(0) * block_q + tl.arange(0, block_q), tl.arange(0, block_d)
    q = load_rows(queries + b * queries_b, queries_q, rows, num_queries, d, head_size)
    peak = tl.full((block_q,), float("-inf"), tl.float32)
    mass = tl.zeros((block_q,), tl.float32)
    summed = tl.zeros((block_q, block_d), tl.float32)
    for first in range(0, n, block_m):
        columns = first + tl.arange(0, block_m)
        k = load_rows(keys + b * keys_b, keys_m, columns, n, d, head_size)
        v = load_rows(values + b * values_b, values_m, columns, n, d, head_size)
        logits = logits_of(q, k, soft_cap)
        logits = tl.where(columns[None, :] < n, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))  # finite: the first block has a key
        shrink, w = tl.exp(peak - higher), tl.exp(logits - higher[:, None])
        mass = mass * shrink + tl.sum(w, 1)
        summed = summed * shrink[:, None] + tl.dot(w, v, input_precision="tf32")
        peak = higher
    inside = rows < num_queries
    tl.store(
        out + b * out_b + rows[:, None] * out_q + d[None, :],
        summed / mass[:, None],
        mask=inside[:, None] & (d[None, :] < head_size),
    )
    tl.store(lse + b * lse_b + rows * lse_q, peak + tl.log(mass), mask=inside)


@triton.jit(do_not_specialize=["lse_b", "scores_b", "num_queries", "n", "power"])
def _received(
    queries, queries_b, queries_q,
    lse, lse_b, lse_q,
    keys, keys_b, keys_m,
    scores, scores_b, scores_m,
    num_queries, n, power,
    head_size: tl.constexpr, soft_cap: tl.constexpr,
    block_q: tl.constexpr, block_m: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    columns, d = tl.program_id(0) * block_m + tl.arange(0, block_m), tl.arange(0, block_d)
    k = load_rows(keys + b * keys_b, keys_m, columns, n, d, head_size)
    total = tl.zeros((block_m,), tl.float32)
    for first in range(0, num_queries, block_q):
        rows = first + tl.arange(0, block_q)
        q = load_rows(queries + b * queries_b, queries_q, rows, num_queries, d, head_size)
        # A row beyond the last query attends to nothing.
        z = tl.load(lse + b * lse_b + rows * lse_q, mask=rows < num_queries, other=float("inf"))
        logits = logits_of(q, k, soft_cap) - z[:, None]
        total += tl.sum(tl.exp(logits * power), 0)
    tl.store(scores + b * scores_b + columns * scores_m, total, mask=columns < n)
