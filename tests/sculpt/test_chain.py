"""Where a context is cut, and what each segment keeps."""

from __future__ import annotations

import pytest

from kvsculpt_vllm.sculpt.budgets import blocks_kept
from kvsculpt_vllm.sculpt.chain import pieces

WINDOW, BLOCK, SEGMENT = 64, 32, 2048


@pytest.mark.parametrize("keep_ratio", [0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("num_tokens", [200, 2048, 3100, 4000, 7900, 20000, 131072])
def test_segments_cover_the_context_and_keep_the_fraction_that_was_asked_for(num_tokens, keep_ratio):
    made = list(pieces(num_tokens, WINDOW, BLOCK, keep_ratio, SEGMENT))
    assert [piece.first for piece in made] == [0, *(piece.end for piece in made[:-1])]
    assert made[-1].end == (num_tokens - WINDOW) // BLOCK
    assert all(1 <= piece.packed_blocks <= piece.blocks <= 1.5 * SEGMENT / BLOCK for piece in made)
    # A segment's pages are whole, so that each may keep one more than its part.
    asked = blocks_kept(keep_ratio, made[-1].end)
    assert asked - len(made) <= sum(piece.packed_blocks for piece in made) <= asked + len(made)


def test_the_last_segment_keeps_more_than_those_before_it_which_keep_the_same():
    *before, last = pieces(7900, WINDOW, BLOCK, 0.3, SEGMENT)
    assert {piece.packed_blocks for piece in before} == {16}
    assert all(piece.followed for piece in before) and not last.followed
    assert (last.packed_blocks, last.blocks) == (26, 52)


def test_a_context_of_one_segment_keeps_what_one_span_does():
    (only,) = pieces(3000, WINDOW, BLOCK, 0.3, SEGMENT)
    assert (only.first, only.blocks, only.packed_blocks) == (0, 91, 28)
