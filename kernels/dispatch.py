"""Which of the two runs: the Triton kernel or its torch twin."""

from __future__ import annotations

import os

from torch import Tensor

VARIABLE = "KVSCULPT_KERNELS"


def use_triton(tensor: Tensor) -> bool:
    """Kernels on CUDA, twins on the CPU.

    ``KVSCULPT_KERNELS`` says otherwise: ``triton`` (on a CPU only with ``TRITON_INTERPRET=1``, for tests) or
    ``torch``, to compare.

    Raises:
        ValueError: the variable holds something else.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "triton", "torch"):
        raise ValueError(f"{VARIABLE}: {choice!r} given, allowed are triton, torch")
    return tensor.is_cuda if choice == "" else choice == "triton"
