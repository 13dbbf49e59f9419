"""What every wrapper checks before it hands pointers to a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 256
"""The largest head size whose tiles fit."""


def check_tensors(
    first: Tensor, dtype: torch.dtype | tuple[torch.dtype, ...], **expected: tuple[Tensor, tuple]
) -> None:
    """Each keyword names a tensor and its shape (None for any size); all must be on `first`'s device and of `dtype`.

    Raises:
        ValueError: naming the tensor, what was given and what is expected.
    """
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    for name, (tensor, shape) in expected.items():
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}: dtype {tensor.dtype} given, allowed: {', '.join(map(str, dtypes))}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: on {tensor.device}, expected on {first.device}")
        if tensor.dim() != len(shape) or any(
            wanted not in (None, size) for size, wanted in zip(tensor.shape, shape, strict=True)
        ):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} given, expected {shape}")


def check_head_size(size: int) -> None:
    """Check that tiles of this head size fit.

    Raises:
        ValueError: they do not.
    """
    if not 1 <= size <= MOST:
        raise ValueError(f"head size: {size} given, allowed: 1 to {MOST}")
