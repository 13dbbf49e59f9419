"""Attention with its log-sum-exp, and how the attention over two disjoint sets of keys joins."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsculpt_vllm.kernels.soft_cap import capped


def attend(
    q: Tensor,  # (B, Q, D) fp32
    k: Tensor,  # (B, m, D) fp32
    v: Tensor,  # (B, m, D) fp32
    scale: float,
    visible: Tensor | None = None,  # bool, broadcastable to (B, Q, m); False hides a key from a query
    soft_cap: float | None = None,  # of the logits
) -> tuple[Tensor, Tensor]:
    """Softmax attention, naive on purpose: this is the formula that everything faster is compared with.

    A query that sees no key gets output 0 and log-sum-exp -inf, which `merge` treats as an empty set.

    Returns:
        out (B, Q, D) and lse (B, Q), lse being ``logsumexp(scale * q kᵀ)`` over the visible keys, or that of the logits
        under the cap.
    """
    logits = capped(torch.bmm(q, k.transpose(1, 2)).mul_(scale), soft_cap)
    if visible is not None:
        logits.masked_fill_(~visible, -torch.inf)
    if not k.shape[1]:  # a maximum of nothing is an error
        return torch.zeros_like(q), torch.full_like(q[..., 0], -torch.inf)
    peak = logits.amax(-1, keepdim=True)
    peak.masked_fill_(peak == -torch.inf, 0.0)
    # One exponential a weight: `torch.logsumexp` would take another, and they are half of the time.
    weights = logits.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = peak.add_(total.log()).squeeze(-1)
    return torch.bmm(weights, v).div_(total.clamp_min_(torch.finfo(total.dtype).tiny)), lse


def attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float, soft_cap: float | None = None) -> tuple[Tensor, Tensor]:
    """What `attend` gives if every query sees every key.

    On a CPU PyTorch's own kernel computes it, the one behind `scaled_dot_product_attention`, which alone tells the
    log-sum-exp. It never has more of the weights than the caches hold, and takes half the time of `attend` (measured:
    benchmarks/LOG.md). It knows no soft cap.
    """
    if q.device.type != "cpu" or soft_cap is not None or not k.shape[1]:
        return attend(q, k, v, scale, soft_cap=soft_cap)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(q[:, None], k[:, None], v[:, None], scale=scale)
    return out[:, 0], lse[:, 0]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over the union of two disjoint key sets, from the attention over each.

    Shapes (..., Q, D) and (..., Q). A query for which both sets are empty gets output 0 and log-sum-exp -inf.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    floor = lse.masked_fill(lse == -torch.inf, 0.0)  # -inf - -inf would be NaN
    weight_a = (lse_a - floor).exp().unsqueeze(-1)
    weight_b = (lse_b - floor).exp().unsqueeze(-1)
    return weight_a * out_a + weight_b * out_b, lse


def with_sink(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The attention (…, Q, D) and log-sum-exp (…, Q) over some keys and one more that has the logit `sink_logits`
    (…, Q), -inf where there is none, and the value 0: a learned sink takes a share of the softmax and adds nothing.
    """
    # Not `logaddexp`, whose last bit depends on how many queries there are.
    both = torch.logsumexp(torch.stack([lse, sink_logits]), dim=0)
    floor = both.masked_fill(both == -torch.inf, 0.0)
    return out * (lse - floor).exp().unsqueeze(-1), both
