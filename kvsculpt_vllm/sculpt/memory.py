"""How large one temporary tensor may be, and how many layers' problems are in memory at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

BYTES = {"cpu": 1 << 23, "cuda": 1 << 27}
"""What a temporary may take. On a CPU 8 MiB: larger ones leave the caches, and from 16 MiB glibc maps and unmaps each
time, when page faults cost more than the arithmetic (measured: benchmarks/LOG.md). On a GPU 128 MiB, and more where
`work_with` says so: larger batches are fewer launches."""

GROUP_BYTES = {"cpu": 4 << 30, "cuda": 1 << 29}
"""What the problems of a group of layers may take, with what is made of them. On a CPU 4 GiB: a segment of a model up
to 0.5B is one group, and nothing of it is built twice. On a GPU 512 MiB, which one layer of an 8B model takes, and more
where `work_with` says so."""

PADDING = {"cpu": 1.25, "cuda": 4.0}
"""How many times the entries of the smallest problem of a batch the largest one may have. All are padded to it. On a
CPU that is work; on a GPU a batch more takes longer than the padding does (measured on an H100: benchmarks/LOG.md)."""

COPIES = 10
"""Tensors as large as a group's queries in float32 that live at once: the queries, what retained entries answer and
what the teacher answers; these again for the batch that is fitted, and the target that is made of it."""


def work_with(device_type: str, temporary: int, group: int) -> None:
    """Let all that is solved in this process on devices of this type take so many bytes from now on: `temporary`
    instead of `BYTES`, `group` instead of `GROUP_BYTES`.
    """
    BYTES[device_type], GROUP_BYTES[device_type] = temporary, group


def max_elements(device: torch.device) -> int:
    """Say how many floats the largest temporary on `device` may have. A single problem's fit is never split, whatever
    its size.
    """
    return BYTES[device.type] // 4


def layer_groups(num_layers: int, layer_bytes: int, group_bytes: int) -> Iterator[range]:
    """Divide the layers into as few groups of about the same length as `group_bytes` allows, a layer at least, if the
    queries of a layer take `layer_bytes` in float32.
    """
    most = max(1, group_bytes // (COPIES * layer_bytes))
    number = -(-num_layers // most)
    for group in range(number):
        yield range(group * num_layers // number, (group + 1) * num_layers // number)
