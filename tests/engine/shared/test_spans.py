"""Which tokens are compressed, and into how many blocks."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.engine.shared.spans import RECOMPUTED_TOKENS, is_repetition, longest_useful_hit, plan_span

block_sizes = st.sampled_from([16, 32, 128])


@given(st.integers(1, 20_000), st.integers(1, 1000), st.integers(1, 2000), st.integers(1, 4000), block_sizes)
@example(100 * 32 + 64, 70, 64, 1, 32)  # 0.07 * 100 is 7.000000000000001
def test_spans_free_blocks_and_keep_the_window_and_the_ratio(num_prompt, per_mille, window, min_tokens, size):
    config = CompressionConfig(method="select", keep_ratio=per_mille / 1000, window=window, min_tokens=min_tokens)
    span = plan_span(config, num_prompt, size)
    blocks = max(num_prompt - window, 0) // size
    packed = -(-per_mille * blocks // 1000)
    if num_prompt < min_tokens or packed >= blocks:
        assert span == (Reason.SHORT if num_prompt < min_tokens else Reason.NOTHING_TO_FREE)
        return
    assert (span.blocks, span.packed_blocks, span.tokens) == (blocks, packed, blocks * size)
    assert 1 <= span.packed_blocks < span.blocks
    assert window <= num_prompt - span.tokens < window + size


@pytest.mark.parametrize(
    ("settings", "num_prompt", "max_tokens", "why"),
    [
        ({"method": "none"}, 5000, None, Reason.OFF),
        ({"method": "select"}, 511, None, Reason.SHORT),
        ({"method": "select", "keep_ratio": 1.0}, 5000, None, Reason.NOTHING_TO_FREE),
        # A span of one block.
        ({"method": "select", "min_tokens": 1, "window": 64}, 64 + 2 * 32 - 1, None, Reason.NOTHING_TO_FREE),
        ({"method": "select", "window": 5000}, 5000, None, Reason.NOTHING_TO_FREE),
        ({"method": "select"}, 5000, 2, Reason.FEW_OUTPUT_TOKENS),
    ],
)
def test_prompts_that_stay_as_they_are(settings, num_prompt, max_tokens, why):
    assert plan_span(CompressionConfig(**settings), num_prompt, 32, max_tokens) == why


def test_three_tokens_are_enough():
    assert plan_span(CompressionConfig(method="select"), 600, 32, 3).blocks == 16


def test_the_smallest_ratio_keeps_a_block():
    config = CompressionConfig(method="select", keep_ratio=1e-12)
    assert plan_span(config, 600, 32).packed_blocks == 1


@pytest.mark.parametrize(("period", "expected"), [(1, True), (2, True), (7, True), (8, False), (900, False)])
def test_a_pattern_of_a_few_tokens_over_and_over_is_a_repetition(period, expected):
    assert is_repetition([i % period for i in range(1500)]) is expected


def test_an_ordinary_text_with_a_long_repetition_in_it_is_none():
    assert not is_repetition([*range(20), *[5] * 1500])
    assert not is_repetition([*[5] * 1500, *range(20)])


@given(st.integers(1, 20_000), block_sizes)
def test_a_prefix_hit_leaves_the_last_tokens_to_compute_but_not_a_block_more(num_prompt, size):
    hit = longest_useful_hit(num_prompt, size)
    assert hit % size == 0 and hit >= 0
    computed = num_prompt - hit
    assert computed >= min(RECOMPUTED_TOKENS, num_prompt)
    assert computed < RECOMPUTED_TOKENS + size
