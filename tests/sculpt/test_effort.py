"""How many positions of a prompt are sampled."""

from __future__ import annotations

import pytest

from kvsculpt_vllm.sculpt.effort import EFFORTS, SAMPLE_BYTES, Effort


@pytest.mark.parametrize("effort", EFFORTS.values(), ids=EFFORTS)
def test_the_sample_fills_its_bytes_and_never_falls_below_the_effort_s_least(effort):
    small, large = SAMPLE_BYTES // (2 * effort.positions), SAMPLE_BYTES
    assert effort.positions_for(small) == 2 * effort.positions
    assert effort.positions_for(large) == effort.positions


@pytest.mark.parametrize(
    ("effort", "num_entries", "positions"),
    [
        ("fast", 2048, 768),
        ("fast", 6144, 768),
        ("balanced", 512, 1536),
        ("balanced", 2048, 1536),
        ("balanced", 3072, 1024),
        ("balanced", 4096, 768),
        ("balanced", 6144, 768),
        ("thorough", 4096, 2048),
    ],
)
def test_a_longer_segment_is_fitted_to_fewer_positions_and_not_to_less_than_fast_has(effort, num_entries, positions):
    assert EFFORTS[effort].fitted_on(num_entries) == positions
    assert Effort(100, 20, 60, key_steps=3).fitted_on(num_entries) == 60
