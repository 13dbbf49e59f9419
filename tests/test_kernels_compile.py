"""What Triton makes of every kernel for an H100, without one: the interpreter does not see that.

Numbers are those of the Triton that CUDA vLLM brings, of launches as an engine makes them: through the functions that
it calls, with tensors of its shapes on the device "meta". None of them is a time; each is a way to lose some.
"""

from functools import partial
from unittest.mock import patch

import pytest
import torch
import triton

from compiled import VERSION, Compiled, compiled
from kvsculpt_vllm.kernels import tiles
from kvsculpt_vllm.kernels.attention_loss import attention_loss
from kvsculpt_vllm.kernels.attention_plan import CHUNKS_PER_PROCESSOR, BatchRows, Prefixes, plan_attention
from kvsculpt_vllm.kernels.attention_scores import attention_with_lse, received
from kvsculpt_vllm.kernels.paged_attention import paged_attention
from kvsculpt_vllm.kernels.pages import Pages, gather, scatter, store

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

PROCESSORS = 132  # of an H100


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention(layers, kv_heads, group, head_size, sinks=False, soft_cap=0.0, block_size=16, cache=torch.bfloat16):
    """A step with rows that decode and others: query heads beside keys and values, as a projection leaves them."""
    rows, width, slots, cells = 16, 2048, 64, layers * kv_heads
    int32, int64 = partial(empty, dtype=torch.int32), partial(empty, dtype=torch.int64)
    heads = kv_heads * group
    buffer = empty(4000 * cells, block_size * 2 * head_size, dtype=cache)
    pages = Pages(buffer, int64(cells), kv_heads, block_size, 2 * head_size, head_size)
    prefixes = Prefixes(int64(4000), *(int64(slots, layers, kv_heads) for _ in range(2)), int64(slots))
    batch = BatchRows(int32(rows, width), int32(rows + 1), int32(rows), int32(9, 2), True, 96)
    query = empty(96, heads + 2 * kv_heads, head_size, dtype=torch.bfloat16)[:, :heads]
    plan = plan_attention(pages, prefixes, batch, CHUNKS_PER_PROCESSOR * PROCESSORS)
    out = empty(96, heads, head_size, dtype=torch.bfloat16)
    logits = head_size**-0.5, empty(heads) if sinks else None, soft_cap
    paged_attention(query, out, pages, prefixes, batch, plan, 3, kv_heads, *logits)
    keys = empty(96, kv_heads, head_size, dtype=cache)
    store(pages, 3, int64(96), keys, keys)
    scatter(pages, int64(5), *gather(pages, int64(5), head_size))


def solver(head_size, soft_cap=None, shared=tiles.LARGE):
    """The solver's kernels on a group of problems, on a GPU whose programs may have so many bytes of shared memory."""
    with patch.object(tiles, "_shared_bytes", lambda device: shared):
        _solver(head_size, soft_cap)


def _solver(head_size, soft_cap):
    problems, queries, entries = 8, 2709, 601
    asked, keys, values = (empty(problems, count, head_size) for count in (queries, entries, entries))
    by_query = empty(problems, queries)
    rest = by_query, empty(problems, queries, head_size), by_query, empty(problems, queries, head_size)
    sizes = empty(problems, dtype=torch.int64)
    attention_loss(asked, *rest, empty(problems), keys, values, sizes, soft_cap=soft_cap)
    attention_with_lse(asked, keys, values, soft_cap)
    received(asked, by_query, keys, 2, soft_cap)


LLAMA_8B, QWEN_1_5B = partial(attention, 32, 8, 4, 128), partial(attention, 28, 2, 6, 128)
GPT_OSS_20B, GEMMA_2_2B = partial(attention, 24, 8, 8, 64, sinks=True), partial(attention, 26, 4, 2, 256, soft_cap=50.0)
LLAMA_1B = partial(attention, 16, 8, 4, 64)
IN_FP8 = partial(attention, 28, 2, 6, 128, cache=torch.float8_e4m3fn)  # Qwen2.5-1.5B's
SOLVER_64, SOLVER_128, SOLVER_256 = (partial(solver, head_size) for head_size in (64, 128, 256))
SOLVER_256_CAPPED = partial(solver, 256, soft_cap=50.0)
SOLVER_128_SMALL = partial(solver, 128, shared=99 << 10)  # a GPU that is not for data centres
NAMES = {case: name for name, case in list(globals().items()) if isinstance(case, partial)}

#   registers, bytes spilled, KiB shared, programs a processor, share of 16 bytes, buffers, copies pending
TABLE = {
    (LLAMA_8B, "attention_plan._measure"): (34, 0, 0, 51, 0.0, 0, 0),
    (LLAMA_8B, "attention_plan._share"): (80, 0, 1, 6, 0.0, 0, 0),
    (LLAMA_8B, "decode_attention._attend"): (142, 0, 70, 3, 1.0, 2, 2),
    (LLAMA_8B, "decode_attention._merge"): (32, 0, 2, 16, 0.26, 0, 0),
    (LLAMA_8B, "pages._copy"): (30, 0, 0, 16, 0.8, 0, 0),
    (LLAMA_8B, "pages._store"): (32, 0, 0, 16, 0.5, 0, 0),
    (LLAMA_8B, "prefill_attention._attend"): (195, 0, 80, 2, 1.0, 2, 0),
    (QWEN_1_5B, "attention_plan._measure"): (33, 0, 0, 51, 0.0, 0, 0),
    (QWEN_1_5B, "attention_plan._share"): (80, 0, 1, 6, 0.0, 0, 0),
    (QWEN_1_5B, "decode_attention._attend"): (142, 0, 70, 3, 1.0, 2, 2),
    (QWEN_1_5B, "decode_attention._merge"): (40, 0, 2, 12, 0.26, 0, 0),
    (QWEN_1_5B, "pages._copy"): (30, 0, 0, 16, 0.8, 0, 0),
    (QWEN_1_5B, "pages._store"): (32, 0, 0, 16, 0.5, 0, 0),
    (QWEN_1_5B, "prefill_attention._attend"): (220, 0, 80, 2, 1.0, 2, 0),
    (IN_FP8, "attention_plan._measure"): (33, 0, 0, 51, 0.0, 0, 0),
    (IN_FP8, "attention_plan._share"): (80, 0, 1, 6, 0.0, 0, 0),
    (IN_FP8, "decode_attention._attend"): (156, 0, 38, 3, 0.33, 2, 2),
    (IN_FP8, "decode_attention._merge"): (40, 0, 2, 12, 0.26, 0, 0),
    (IN_FP8, "pages._copy"): (18, 0, 0, 21, 0.66, 0, 0),
    (IN_FP8, "pages._store"): (32, 0, 0, 16, 0.5, 0, 0),
    (IN_FP8, "prefill_attention._attend"): (174, 0, 64, 2, 1.0, 1, 0),
    (LLAMA_1B, "attention_plan._measure"): (34, 0, 0, 51, 0.0, 0, 0),
    (LLAMA_1B, "attention_plan._share"): (80, 0, 1, 6, 0.0, 0, 0),
    (LLAMA_1B, "decode_attention._attend"): (80, 0, 36, 6, 1.0, 2, 2),
    (LLAMA_1B, "decode_attention._merge"): (32, 0, 1, 16, 0.18, 0, 0),
    (LLAMA_1B, "pages._copy"): (18, 0, 0, 21, 0.66, 0, 0),
    (LLAMA_1B, "pages._store"): (32, 0, 0, 16, 0.5, 0, 0),
    (LLAMA_1B, "prefill_attention._attend"): (128, 0, 40, 4, 1.0, 2, 0),
    (GPT_OSS_20B, "attention_plan._measure"): (33, 0, 0, 51, 0.0, 0, 0),
    (GPT_OSS_20B, "attention_plan._share"): (80, 0, 1, 6, 0.0, 0, 0),
    (GPT_OSS_20B, "decode_attention._attend"): (80, 0, 36, 6, 1.0, 2, 2),
    (GPT_OSS_20B, "decode_attention._merge"): (32, 0, 1, 16, 0.18, 0, 0),
    (GPT_OSS_20B, "pages._copy"): (18, 0, 0, 21, 0.66, 0, 0),
    (GPT_OSS_20B, "pages._store"): (32, 0, 0, 16, 0.5, 0, 0),
    (GPT_OSS_20B, "prefill_attention._attend"): (132, 0, 40, 3, 1.0, 2, 0),
    (GEMMA_2_2B, "attention_plan._measure"): (33, 0, 0, 51, 0.0, 0, 0),
    (GEMMA_2_2B, "attention_plan._share"): (80, 0, 1, 6, 0.0, 0, 0),
    (GEMMA_2_2B, "decode_attention._attend"): (147, 0, 73, 3, 1.0, 2, 2),
    (GEMMA_2_2B, "decode_attention._merge"): (48, 0, 2, 10, 0.34, 0, 0),
    (GEMMA_2_2B, "pages._copy"): (40, 0, 0, 12, 0.88, 0, 0),
    (GEMMA_2_2B, "pages._store"): (32, 0, 0, 16, 0.5, 0, 0),
    (GEMMA_2_2B, "prefill_attention._attend"): (255, 20, 96, 2, 1.0, 2, 0),
    (SOLVER_64, "attention_loss._backward"): (212, 0, 56, 2, 0.82, 0, 0),
    (SOLVER_64, "attention_loss._forward"): (151, 0, 56, 3, 0.84, 0, 0),
    (SOLVER_64, "attention_scores._attend"): (128, 0, 56, 4, 1.0, 0, 0),
    (SOLVER_64, "attention_scores._received"): (120, 0, 32, 4, 0.85, 0, 0),
    (SOLVER_128, "attention_loss._backward"): (255, 348, 112, 2, 0.9, 0, 0),
    (SOLVER_128, "attention_loss._forward"): (255, 204, 105, 2, 1.0, 1, 0),
    (SOLVER_128, "attention_scores._attend"): (255, 172, 105, 2, 1.0, 1, 0),
    (SOLVER_128, "attention_scores._received"): (255, 0, 64, 2, 0.92, 0, 0),
    (SOLVER_128_SMALL, "attention_loss._backward"): (255, 8, 80, 2, 0.78, 0, 0),
    (SOLVER_128_SMALL, "attention_loss._forward"): (255, 56, 53, 2, 0.8, 0, 0),
    (SOLVER_128_SMALL, "attention_scores._attend"): (255, 40, 53, 2, 1.0, 0, 0),
    (SOLVER_128_SMALL, "attention_scores._received"): (255, 0, 48, 2, 0.88, 0, 0),
    (SOLVER_256, "attention_loss._backward"): (255, 328, 128, 1, 0.9, 0, 0),
    (SOLVER_256, "attention_loss._forward"): (255, 8, 67, 2, 0.9, 0, 0),
    (SOLVER_256, "attention_scores._attend"): (255, 8, 67, 2, 1.0, 0, 0),
    (SOLVER_256, "attention_scores._received"): (228, 0, 80, 2, 0.92, 0, 0),
    (SOLVER_256_CAPPED, "attention_loss._backward"): (255, 328, 128, 1, 0.9, 0, 0),
    (SOLVER_256_CAPPED, "attention_loss._forward"): (255, 8, 67, 2, 0.9, 0, 0),
    (SOLVER_256_CAPPED, "attention_scores._attend"): (255, 8, 67, 2, 1.0, 0, 0),
    (SOLVER_256_CAPPED, "attention_scores._received"): (228, 0, 80, 2, 0.92, 0, 0),
}
"""At most so many registers, spills and shared memory, and at least so much of the others."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Each case's kernels, compiled once."""
    assert triton.__version__ == VERSION, (
        f"Triton {triton.__version__} is installed, and {VERSION} is what CUDA vLLM 0.32 brings: run 'make setup'"
    )
    return {case: compiled(case, tmp_path_factory.mktemp("triton")) for case in {case for case, _ in TABLE}}


@pytest.mark.parametrize(("case", "kernel"), TABLE, ids=lambda part: part if isinstance(part, str) else NAMES[part])
def test_a_kernel_is_compiled_to_no_less_than_it_was(case, kernel, measured):
    found, wanted = measured[case][kernel], Compiled(*TABLE[case, kernel])
    for field in ("registers", "spilled", "shared"):
        assert getattr(found, field) <= getattr(wanted, field), (field, found)
    for field in ("programs", "wide", "buffers", "pending"):
        assert getattr(found, field) >= getattr(wanted, field), (field, found)


def test_every_kernel_that_is_launched_has_its_numbers(measured):
    assert {(case, kernel) for case, kernels in measured.items() for kernel in kernels} == set(TABLE)
