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
    speed.heard(config, span_tokens=1000, seconds=5.0)
    assert speed.steps(config, 2000) == steps


def test_efforts_and_methods_have_speeds_of_their_own():
    speed = Speed()
    speed.heard(FAST, 1000, 5.0)
    assert speed.steps(FAST.model_copy(update={"effort": "thorough"}), 1000) == 0
    assert speed.steps(FAST.model_copy(update={"method": "select"}), 1000) == 0


def test_the_newest_counts_half():
    speed = Speed()
    speed.heard(FAST, 1000, 1.0)
    speed.heard(FAST, 1000, 3.0)
    assert speed.steps(FAST, 1000) == 10
