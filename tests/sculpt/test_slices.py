"""Work in slices: other computations may run in between, under settings of their own."""

from contextlib import contextmanager

import torch

from kvsculpt_vllm.sculpt.compress import compress, compress_in_slices
from kvsculpt_vllm.sculpt.slices import Stopwatch, finish, within
from tests.sculpt.test_compress import BLOCK, EFFORT, HEADS, PLAN, QUERIES, SINKS, SPAN_PAGES


def count_to(limit):
    for _ in range(limit):
        yield
        assert INSIDE, "outside of its context"
    return limit


INSIDE = []


@contextmanager
def inside():
    INSIDE.append(True)
    try:
        yield
    finally:
        INSIDE.pop()


def test_every_slice_runs_in_its_context_and_nothing_between_them_does():
    clock = Stopwatch()
    slices = within(clock, within(inside, count_to(3)))
    for _ in range(3):
        next(slices)
        assert not INSIDE
    before = clock.seconds
    torch.randn(500, 500) @ torch.randn(500, 500)
    assert clock.seconds == before > 0
    assert finish(slices) == 3 and not INSIDE


def test_a_compression_is_the_same_with_other_work_between_its_slices(make_case):
    entries = SPAN_PAGES * BLOCK - SINKS
    problems = make_case(HEADS, QUERIES, entries, head_size=16, dtype=torch.bfloat16, seed=2).problems
    wanted = compress(problems, PLAN, "sculpt", "adaptive", EFFORT)
    precision = torch.backends.mkldnn.matmul.fp32_precision

    def disturbed():
        slices = compress_in_slices(problems, PLAN, "sculpt", "adaptive", EFFORT)
        while True:
            try:
                next(slices)
            except StopIteration as done:
                return done.value
            assert torch.backends.mkldnn.matmul.fp32_precision == precision
            torch.rand(3)
            pauses.append(None)

    pauses = []
    result = disturbed()
    assert len(pauses) > 2 * EFFORT.key_steps
    assert result.pages == wanted.pages
    for name in ("keys", "values"):
        assert all(map(torch.equal, getattr(result, name), getattr(wanted, name)))
