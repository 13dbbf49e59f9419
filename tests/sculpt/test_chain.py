"""Where a context is cut, and what each segment keeps."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvsculpt_vllm.sculpt.budgets import blocks_kept
from kvsculpt_vllm.sculpt.chain import AGES, LEAST, longest, next_piece, pieces, segment_for
from kvsculpt_vllm.sculpt.effort import EFFORTS

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


def test_segments_share_what_is_kept_by_their_age():
    *before, last = pieces(7900, WINDOW, BLOCK, 0.3, SEGMENT)
    assert all(piece.followed for piece in before) and not last.followed
    assert [piece.blocks for piece in (*before, last)] == [64, 64, 64, 52]
    # 74 of 244 blocks, in the ratios of AGES
    one = 74 / (52 * AGES[0] + 64 * AGES[1] + 128 * AGES[2])
    wanted = [64 * AGES[2] * one, 64 * AGES[2] * one, 64 * AGES[1] * one, 52 * AGES[0] * one]
    assert [piece.packed_blocks for piece in (*before, last)] == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize("keep_ratio", [0.1, 0.3, 0.5, 0.7])
def test_of_two_segments_the_later_never_keeps_the_smaller_part(keep_ratio):
    for num_tokens in (4000, 5000, 7900, 20000, 131072):
        kept = [piece.packed_blocks / piece.blocks for piece in pieces(num_tokens, WINDOW, BLOCK, keep_ratio, SEGMENT)]
        # A segment's pages are whole, and what one has rounded up the next ones have less.
        assert all(later > earlier - 1.5 * BLOCK / SEGMENT for earlier, later in pairwise(kept))


def test_a_chain_that_goes_on_has_less_to_give_until_it_has_grown():
    blocks = SEGMENT // BLOCK
    generous = {"chain_blocks": blocks, "chain_packed": blocks // 2}
    first = next_piece(2 * SEGMENT + WINDOW, WINDOW, BLOCK, 0.3, SEGMENT, **generous)
    assert first.packed_blocks == blocks_kept(LEAST * 0.3, blocks)
    later = next_piece(8 * SEGMENT + WINDOW, WINDOW, BLOCK, 0.3, SEGMENT, **generous)
    assert first.packed_blocks < later.packed_blocks


def test_a_context_of_one_segment_keeps_what_one_span_does():
    (only,) = pieces(3000, WINDOW, BLOCK, 0.3, SEGMENT)
    assert (only.first, only.blocks, only.packed_blocks) == (0, 91, 28)


@pytest.mark.parametrize(
    ("layers", "heads", "head_size", "segment"),
    [(30, 9, 64, 4096), (16, 32, 64, 4096), (28, 12, 128, 2048), (32, 32, 128, 2048)],
    ids=["SmolLM2-135M", "Llama-3.2-1B", "Qwen2.5-1.5B", "Llama-3.1-8B"],
)
def test_small_models_make_long_segments_and_every_position_is_sampled(layers, heads, head_size, segment):
    numbers = layers * heads * head_size
    assert segment_for(numbers) == segment
    assert EFFORTS["fast"].positions_for(2 * numbers) >= longest(segment) + WINDOW


@pytest.mark.parametrize("segment", [64, 256, 2048, 4096])
def test_no_segment_is_longer_than_the_longest(segment):
    lengths = [
        piece.blocks * 16
        for num_tokens in range(WINDOW + 16, 4 * segment, 16)
        for piece in pieces(num_tokens, WINDOW, 16, 0.3, segment)
    ]
    assert longest(segment) - 16 <= max(lengths) <= longest(segment)
