"""How many positions of a prompt are sampled."""

from __future__ import annotations

import pytest

from kvsculpt_vllm.sculpt.effort import EFFORTS, SAMPLE_BYTES


@pytest.mark.parametrize("effort", EFFORTS.values(), ids=EFFORTS)
def test_the_sample_fills_its_bytes_and_never_falls_below_the_effort_s_least(effort):
    small, large = SAMPLE_BYTES // (2 * effort.positions), SAMPLE_BYTES
    assert effort.positions_for(small) == 2 * effort.positions
    assert effort.positions_for(large) == effort.positions
