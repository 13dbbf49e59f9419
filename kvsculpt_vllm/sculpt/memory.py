"""How large one temporary tensor may be: the byte budget by which problems and queries are taken in groups."""

from __future__ import annotations

import torch

BYTES = {"cpu": 1 << 24, "cuda": 1 << 30}
"""On a CPU 16 MiB: larger ones glibc maps and unmaps each time, and the page faults cost more than the arithmetic
(measured: 4 to 10 times). On a GPU 1 GiB: enough to fill it."""


def max_elements(device: torch.device) -> int:
    """Floats in the largest temporary on `device`. A single problem's fit is never split, whatever its size."""
    return BYTES[device.type] // 4
