"""How much memory a solve takes beside the model and its cache: what a GPU worker keeps free."""

from __future__ import annotations

FIT_COPIES = 10
"""Tensors as large as all queries in float32 that live at once: queries, what the teacher answers, what retained
entries answer, the thinned copies that fits use, and what is being joined from parts."""

TEMPORARIES = 4
"""Temporaries of the largest size that live at once."""


def solve_bytes(
    num_problems: int,  # layers times KV heads
    query_rows: int,  # of one problem: sampled positions, the recent ones twice, times query heads of its group
    head_size: int,
    prompt_tokens: int,
    cache_bytes: int,  # of one element of the cache
    largest_temporary: int,  # bytes
) -> int:
    """Estimate from above the bytes that the solve of one prompt takes. A test holds it to what a solve takes on the
    CPU.
    """
    queries = num_problems * query_rows * head_size * 4
    span = 2 * num_problems * prompt_tokens * head_size * cache_bytes
    return FIT_COPIES * queries + 2 * span + TEMPORARIES * largest_temporary
