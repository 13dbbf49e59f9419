"""A soft cap on logits, and how steep it is: what every other logit is in a model that has one.

With a cap c a logit s becomes ``c tanh(s / c)`` before the softmax (Gemma 2, arXiv 2408.00118), and the derivative by s
is ``1 - tanh²(s / c)``. A model's cap never changes, so that kernels are compiled for it. Without one they are as if
this file were not there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """The `logits`, changed in place, under a soft cap; None changes nothing."""
    return logits if soft_cap is None else logits.div_(soft_cap).tanh_().mul_(soft_cap)


def slope_at(capped_logits: Tensor, soft_cap: float) -> Tensor:
    """How much a logit under the cap changes with the logit itself, at `capped_logits`."""
    return (capped_logits / soft_cap).square_().neg_().add_(1.0)


@triton.jit
def cap_tile(logits, soft_cap: tl.constexpr):
    """See `capped`; without changing what is given."""
    # 2 sigmoid(2x) - 1 is tanh(x), off by the last bit of 1, which is the last bit of the cap.
    return logits if soft_cap is None else soft_cap * (2.0 * tl.sigmoid(logits * (2.0 / soft_cap)) - 1.0)


@triton.jit
def slope_tile(capped_logits, soft_cap: tl.constexpr):
    """See `slope_at`."""
    t = capped_logits * (1.0 / soft_cap)
    return 1.0 - t * t
