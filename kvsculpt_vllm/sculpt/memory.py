"""How large one temporary tensor may be: the byte budget by which problems and queries are taken in groups."""

from __future__ import annotations

import torch

BYTES = {"cpu": 1 << 23, "cuda": 1 << 30}
"""On a CPU 8 MiB: larger ones leave the caches, and from 16 MiB glibc maps and unmaps each time, when page faults cost
more than the arithmetic (measured: benchmarks/LOG.md). On a GPU 1 GiB: enough to fill it."""


def max_elements(device: torch.device) -> int:
    """Say how many floats the largest temporary on `device` may have. A single problem's fit is never split, whatever
    its size.
    """
    return BYTES[device.type] // 4
