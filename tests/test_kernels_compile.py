"""Every kernel compiles for an H100, without one, and fits its shared memory: the interpreter checks neither."""

import re

import pytest
import triton
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvsculpt_vllm.kernels import attention_loss, attention_scores, pages, tiles

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

H100 = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 << 10
FLOAT32, BF16, INT64 = "*fp32", "*bf16", "*i64"
NUMBERS_BY_ROW = {
    f"{name}_{stride}" for name in ("shift", "retained_mass", "push", "lse", "scores") for stride in ("b", "q", "m")
}
"""Strides of the solver's tensors that have a number for each query or entry."""
OTHERS = {"sizes": INT64, "lse_weight": "fp32"}  # of the solver's kernels; what has no strides is a plain number


def compiled(kernel, types, constants, num_stages, multiples_of_16=()):
    """`kernel` compiled for an H100; arguments not in `types` are 32-bit integers."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples_of_16}
    source = ASTSource(kernel, signature, places, attributes)
    return compile_kernel(source, target=H100, options={"num_stages": num_stages})


def shared_bytes(kernel, types, constants, num_stages):
    """Shared memory that it takes."""
    return compiled(kernel, types, constants, num_stages).metadata.shared


@pytest.mark.parametrize(("head_size", "soft_cap"), [(64, None), (128, None), (256, None), (256, 50.0)])
@pytest.mark.parametrize(
    "kernel",
    [
        attention_loss._forward,
        attention_loss._backward,
        attention_scores._attend,
        attention_scores._received,
    ],
    ids=lambda kernel: kernel.fn.__qualname__,
)
def test_the_solvers_kernels(kernel, head_size, soft_cap):
    constants = tiles.tiling(head_size) | {"soft_cap": soft_cap}
    num_stages = constants.pop("num_stages")
    if "tiny" in kernel.arg_names:
        constants["tiny"] = tiles.TINY
    # A tensor's strides follow it, as `queries_b`.
    tensors = [name for name in kernel.arg_names if any(other.startswith(f"{name}_") for other in kernel.arg_names)]
    types = dict.fromkeys([*tensors, "out_norm", "partial"], FLOAT32) | OTHERS
    # What holds for every prompt: addresses and what is a multiple of the head size are aligned.
    strides = [name for name in kernel.arg_names if name.endswith(("_b", "_q", "_m")) and name not in constants]
    by_head_size = [name for name in strides if name not in NUMBERS_BY_ROW]
    unspecialised = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    assert not unspecialised & set(by_head_size)
    assert {name for name in ("num_queries", "n", "power") if name in kernel.arg_names} <= unspecialised
    found = compiled(kernel, types, constants, num_stages, [*tensors, *by_head_size])
    assert found.metadata.shared <= SHARED_BYTES
    loads = re.findall(r"ld\.global\S*", found.asm["ptx"])
    assert sum(".v4" in load for load in loads) >= 0.8 * len(loads)


@pytest.mark.parametrize("out_of_pages", [True, False])
def test_page_copies(out_of_pages):
    constants = {"block_size": 16, "head_size": 96, "block_n": 16, "block_d": 128, "out_of_pages": out_of_pages}
    shared_bytes(pages._copy, {"buffer": BF16, "index": INT64, "keys": BF16, "values": BF16}, constants, num_stages=2)


@pytest.mark.parametrize("num_heads", [1, 2, 8])
def test_the_store_of_a_steps_entries(num_heads):
    constants = {
        "block_size": 16,
        "num_heads": num_heads,
        "head_size": 96,
        "block_t": 2,
        "block_h": num_heads,
        "block_d": 128,
    }
    types = {"buffer": BF16, "cell_pages": INT64, "slots": INT64, "keys": BF16, "values": BF16}
    shared_bytes(pages._store, types, constants, num_stages=2)
