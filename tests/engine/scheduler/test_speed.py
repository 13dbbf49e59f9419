"""Whether a compression would be over before its request's answer."""

import pytest

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.scheduler.speed import Speed

FAST = CompressionConfig(method="sculpt", effort="fast", max_stall_ms=200)


def test_nothing_is_known_before_a_compression_was_measured():
    assert Speed().steps(FAST, 10_000) == 0


@pytest.mark.parametrize(("stall_ms", "steps"), [(200, 50), (1000, 10), (60_000, 0), (0, 1000)])
def test_steps_grow_with_the_span_and_shrink_with_the_bound(stall_ms, steps):
    speed, config = Speed(), FAST.model_copy(update={"max_stall_ms": stall_ms})
    speed.heard(config, span_tokens=1000, seconds=500.0)  # the first of its kind compiles
    speed.heard(config, span_tokens=1000, seconds=5.0)
    assert speed.steps(config, 2000) == steps


def test_efforts_and_methods_have_speeds_of_their_own():
    speed = Speed()
    for _ in range(2):
        speed.heard(FAST, 1000, 5.0)
    assert speed.steps(FAST, 1000) == 25
    assert speed.steps(FAST.model_copy(update={"effort": "thorough"}), 1000) == 0
    assert speed.steps(FAST.model_copy(update={"method": "select"}), 1000) == 0


def test_the_newest_counts_half():
    speed = Speed()
    for seconds in (9.0, 1.0, 3.0):
        speed.heard(FAST, 1000, seconds)
    assert speed.steps(FAST, 1000) == 10


def test_an_estimate_that_keeps_requests_waiting_shrinks_until_one_is_tried():
    speed = Speed()
    for _ in range(2):
        speed.heard(FAST, 1000, 20.0)
    steps = []
    while not steps or steps[-1] >= 24:
        steps.append(speed.steps(FAST, 1000))
        speed.doubt(FAST)
    assert steps[0] == 100 and len(steps) < 10
