"""Products and solutions in float32, as fast as this device can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.backends import _FP32Precision

EXACT = 1e-5
"""Largest error of a float32 product relative to its largest element; bfloat16 arithmetic is a hundred times worse."""


@contextmanager
def fast_matmul() -> Iterator[None]:
    """A context in which float32 products on the CPU go to oneDNN where that is exact, and stay with MKL elsewhere.

    MKL leaves AVX-512 alone on processors of other makers; oneDNN is twice as fast there (measured on an AMD EPYC,
    benchmarks/LOG.md). PyTorch sends float32 products to oneDNN only if they may also be computed in bfloat16, and
    oneDNN makes use of that on processors with AMX: `_exact` finds it out, and nothing is changed there. The setting
    holds for the whole process, so nothing else should multiply matrices meanwhile.
    """
    settings = _settings()
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if _exact() else before
    try:
        yield
    finally:
        settings.fp32_precision = before


def _settings() -> _FP32Precision:
    """The precision of oneDNN's matrix products, in its attribute `fp32_precision`."""
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch replaces this module by an object


@cache
def _exact() -> bool:
    """Whether products that may use bfloat16 are as exact as float32 here."""
    settings = _settings()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 512, 512, generator=generator) for _ in range(2))
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        product = torch.bmm(a, b)
    finally:
        settings.fp32_precision = before
    wanted = torch.bmm(a.double(), b.double())
    return bool((product - wanted).abs().max() < EXACT * wanted.abs().max())


def matvec(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Products (B, n, 1) of `matrices` (B, n, m) with `vectors` (B, m, 1).

    On a CPU one by one: a batch goes to a kernel for matrices, which for a single column is four times slower.
    """
    if matrices.device.type != "cpu":
        return torch.bmm(matrices, vectors)
    return torch.stack([torch.mv(a, x) for a, x in zip(matrices, vectors.squeeze(-1), strict=True)]).unsqueeze(-1)


@contextmanager
def rounded_products(device: torch.device) -> Iterator[None]:
    """A context in which a GPU rounds what it multiplies to TF32, 10 bits behind the point, as its matrix units take
    it; sums stay float32. On a CPU nothing changes.

    For Gram matrices of weights: a weight that is off by a two-thousandth moves the values that fit best by far less
    than a ridge does (benchmarks/LOG.md has what it costs, and it is three times as fast on an H100).
    """
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def solved_by(factors: Tensor, rhs: Tensor) -> Tensor:
    """Solutions X (…, n, k) of L Lᵀ X = `rhs` (…, n, k) for lower Cholesky `factors` L (…, n, n).

    By two triangular solves: `torch.cholesky_solve` launches hundreds of small kernels for a batch, and takes two and a
    half times as long on an H100.
    """
    half = torch.linalg.solve_triangular(factors, rhs, upper=False)
    return torch.linalg.solve_triangular(factors.mT, half, upper=True)
