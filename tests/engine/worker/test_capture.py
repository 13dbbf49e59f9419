"""Sampled queries do not depend on how a prompt was cut into chunks, nor on what else was in the batch."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvsculpt_vllm.engine.worker.capture import QuerySample
from kvsculpt_vllm.sculpt.queries import RECENT_POSITIONS, sample_positions

LAYERS, HEADS, HEAD_SIZE = 2, 3, 4


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 10**6), st.integers(1, 3072))
@example(138, 785_672, 135)  # float32 gives one position twice
def test_positions_are_distinct_computed_and_end_with_the_prompt(available, first, count):
    num_prompt = first + available
    positions, recent = sample_positions(first, num_prompt, count)
    expected = min(count, available)
    assert len(positions) == expected
    assert positions[0] >= first and positions[-1] == num_prompt - 1
    assert (positions.diff() > 0).all()
    assert 1 <= recent <= RECENT_POSITIONS and (recent == RECENT_POSITIONS or recent == max(1, expected // 4))
    assert positions[-recent:].tolist() == list(range(num_prompt - recent, num_prompt))
    # The others leave no hole that is much larger than an even spread's.
    if recent < expected:
        assert positions[0] == first
        assert positions.diff().max() <= (available - recent) / (expected - recent) * 2 + 1


@st.composite
def prompts(draw):
    """First computed position, prompt length, sample size, and chunks as (tokens, other rows before them)."""
    first, available = draw(st.integers(0, 50)), draw(st.integers(1, 80))
    chunks, left = [], available
    while left:
        tokens = draw(st.integers(1, left))
        chunks.append((tokens, draw(st.integers(0, 5))))
        left -= tokens
    return first, first + available, draw(st.integers(1, 40)), chunks


@settings(max_examples=80, deadline=None)
@given(prompts())
def test_chunks_give_the_sample_of_the_whole_prompt(prompt):
    first, num_prompt, count, chunks = prompt
    computed = torch.randn(LAYERS, num_prompt, HEADS, HEAD_SIZE)
    positions, recent = sample_positions(first, num_prompt, count)
    sample = QuerySample(positions, recent, LAYERS, HEADS, HEAD_SIZE, like=computed)
    sample.queries.fill_(torch.nan)
    begin = first
    for tokens, before in chunks:
        assert not sample.complete
        others = torch.full((before, HEADS, HEAD_SIZE), 1e9)
        rows = sample.rows(begin, tokens, before)
        in_chunk = ((positions >= begin) & (positions < begin + tokens)).sum()
        assert (rows is None) == (in_chunk == 0)
        if rows is not None:
            for layer in range(LAYERS):
                rows.store(layer, torch.cat([others, computed[layer, begin : begin + tokens], others]))
        begin += tokens
    assert sample.complete
    assert torch.equal(sample.queries, computed[:, positions])


def test_decoding_adds_nothing():
    positions, recent = sample_positions(0, 20, 8)
    sample = QuerySample(positions, recent, LAYERS, HEADS, HEAD_SIZE, like=torch.empty(0))
    assert sample.rows(20, 3, 0) is None
    assert not sample.complete


class NoMemory:
    """What samples are allocated like, on a device that is full; and what they are written to then."""

    device = "cpu"

    def new_empty(self, *shape):
        raise RuntimeError("injected")

    __setitem__ = new_empty


def test_a_prompt_whose_queries_find_no_room_is_not_sampled_and_says_why():
    positions, recent = sample_positions(0, 20, 8)
    sample = QuerySample(positions, recent, LAYERS, HEADS, HEAD_SIZE, like=NoMemory())
    assert sample.rows(0, 20, 0) is None
    assert not sample.complete and "injected" in sample.failure


def test_a_copy_that_fails_ends_the_sampling_and_nothing_else():
    positions, recent = sample_positions(0, 20, 8)
    sample = QuerySample(positions, recent, LAYERS, HEADS, HEAD_SIZE, like=torch.empty(0))
    rows = sample.rows(0, 20, 0)
    sample.queries = NoMemory()
    for layer in range(LAYERS):
        rows.store(layer, torch.zeros(20, HEADS, HEAD_SIZE))
    assert not sample.complete and "injected" in sample.failure and sample.queries is None
