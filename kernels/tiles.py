"""What the solver's kernels share: tiles of queries and entries, the weights between them, and what is checked first.

All of them take tensors with the strides of their first two dimensions behind each (`with_strides`). What changes from
prompt to prompt (numbers of queries and entries, and the strides that are made of nothing else) is not specialised:
no request has to wait for another compilation. Strides that are multiples of the head size are: loads of 16 bytes need
to know that they are aligned, and they always are alike.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsculpt_vllm.kernels.checks import check_head_size, check_tensors
from kvsculpt_vllm.kernels.soft_cap import cap_tile

TINY = torch.finfo(torch.float32).tiny


LARGE = 160 << 10
"""Bytes of shared memory of which a program may have so many on data-centre GPUs (A100, H100); others have 99 KiB."""


@cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have. What runs elsewhere is interpreted or compiled for an H100."""
    if device.type != "cuda":
        return LARGE
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in torch's stubs


def tiling(head_size: int, device: torch.device, streams_entries: bool) -> dict[str, int]:
    """Give the constants of a launch: the head size, queries and keys of a tile, the head size padded to a power of
    two, and the stages: tiles in shared memory at once or on the way there.

    A kernel that `streams_entries` has its queries in registers and reads keys and values, others read queries for the
    keys they have. The fastest of those measured on an H100 with head size 128 (benchmarks/LOG.md), and what fits where
    there is less shared memory. Registers, spills and shared memory are in tests/test_kernels_compile.py.
    """
    block_d = max(16, triton.next_power_of_2(head_size))
    block_q, block_m, num_stages = 64, 32, 1
    if block_d > 128:
        block_q = 16
    elif block_d == 128 and _shared_bytes(device) < LARGE:
        block_q = 32
    elif block_d == 128 and streams_entries:
        block_q, block_m, num_stages = 32, 64, 2
    return {
        "head_size": head_size,
        "block_q": block_q,
        "block_m": block_m,
        "block_d": block_d,
        "num_stages": num_stages,
    }


def check_problems(
    queries: Tensor,
    shift: Tensor,
    out: Tensor,
    retained_mass: Tensor,
    retained_sum: Tensor,
    keys: Tensor,
    values: Tensor,
    sizes: Tensor,
) -> None:
    """Check the arguments that all of the solver's kernels start with; see `attention_loss.attention_loss` for shapes.

    Raises:
        ValueError: a shape, dtype, device or head size does not fit.
    """
    batch, num_queries, head_size = queries.shape
    by_query, by_entry = (batch, num_queries, head_size), (batch, keys.shape[1], head_size)
    check_head_size(head_size)
    check_tensors(
        queries,
        torch.float32,
        queries=(queries, by_query),
        shift=(shift, by_query[:2]),
        out=(out, by_query),
        retained_mass=(retained_mass, by_query[:2]),
        retained_sum=(retained_sum, by_query),
        keys=(keys, by_entry),
        values=(values, by_entry),
    )
    check_tensors(queries, (torch.int32, torch.int64), sizes=(sizes, (batch,)))


def with_strides(*tensors: Tensor) -> list[Tensor | int]:
    """List each tensor (2D or 3D) followed by the strides of its first two dimensions. A last dimension that is not
    contiguous is copied.
    """
    flat: list[Tensor | int] = []
    for tensor in tensors:
        if tensor.dim() == 3 and tensor.stride(2) != 1:
            tensor = tensor.contiguous()
        flat += [tensor, tensor.stride(0), tensor.stride(1)]
    return flat


@triton.jit
def load_rows(base, row_stride, rows, count, columns, width):
    """A tile (rows, columns) with zeros outside; columns are contiguous."""
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def logits_of(q, k, soft_cap: tl.constexpr):
    """q·k, nearly in float32, under a soft cap if the model has one."""
    return cap_tile(tl.dot(q, tl.trans(k), input_precision="tf32x3"), soft_cap)


@triton.jit
def relative_weights(logits, z, columns, size):
    """e^(logit - z), 0 for columns that are padding."""
    return tl.where(columns[None, :] < size, tl.exp(logits - z[:, None]), 0.0)


@triton.jit
def load_queries(queries, queries_q, shift, shift_q, rows, count, columns, width):
    """A tile of queries and their shifts, 0 for rows beyond the last."""
    q = load_rows(queries, queries_q, rows, count, columns, width)
    return q, tl.load(shift + rows * shift_q, mask=rows < count, other=0.0)


@triton.jit
def attend_tile(
    q, z, keys, keys_m, values, values_m, retained_mass, retained_mass_q, retained_sum, retained_sum_q,
    rows, num_queries, size, d, tiny: tl.constexpr, head_size: tl.constexpr, block_m: tl.constexpr,
    soft_cap: tl.constexpr,
):  # fmt: skip
    """Mass M (at least `tiny`) and output o of a tile of queries over a problem's entries and the retained ones."""
    summed = load_rows(retained_sum, retained_sum_q, rows, num_queries, d, head_size)
    mass = tl.load(retained_mass + rows * retained_mass_q, mask=rows < num_queries, other=1.0)
    for first in range(0, size, block_m):
        columns = first + tl.arange(0, block_m)
        k = load_rows(keys, keys_m, columns, size, d, head_size)
        v = load_rows(values, values_m, columns, size, d, head_size)
        w = relative_weights(logits_of(q, k, soft_cap), z, columns, size)
        mass += tl.sum(w, 1)
        summed += tl.dot(w, v, input_precision="tf32")
    mass = tl.maximum(mass, tiny)
    return mass, summed / mass[:, None]
