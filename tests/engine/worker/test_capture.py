"""Kept queries do not depend on how a prompt was cut into chunks, nor on what else was in the batch."""

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsculpt_vllm.engine.shared.commands import SampleCommand
from kvsculpt_vllm.engine.worker import state
from kvsculpt_vllm.engine.worker.capture import CaptureRows, QuerySample
from kvsculpt_vllm.sculpt.queries import RECENT_POSITIONS, sample_positions

LAYERS, HEADS, HEAD_SIZE = 2, 3, 4


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 10**6), st.integers(1, 3072))
def test_positions_are_distinct_computed_and_end_with_the_prompt(available, first, count):
    end = first + available
    positions, recent = sample_positions(first, end, count)
    expected = min(count, available)
    assert len(positions) == expected
    assert positions[0] >= first and positions[-1] == end - 1
    assert (positions.diff() > 0).all()
    assert 1 <= recent <= RECENT_POSITIONS and (recent == RECENT_POSITIONS or recent == max(1, expected // 4))
    assert positions[-recent:].tolist() == list(range(end - recent, end))
    # The others leave no hole that is much larger than an even spread's.
    if recent < expected:
        assert positions[0] == first
        assert positions.diff().max() <= (available - recent) / (expected - recent) * 2 + 1


@st.composite
def prompts(draw):
    """First computed position, end, chunks as (tokens, other rows before them), and what is packed on the way."""
    first, available = draw(st.integers(0, 50)), draw(st.integers(1, 80))
    chunks, left = [], available
    while left:
        tokens = draw(st.integers(1, left))
        chunks.append((tokens, draw(st.integers(0, 5))))
        left -= tokens
    return first, first + available, chunks, draw(st.integers(0, available - 1))


@settings(max_examples=80, deadline=None)
@given(prompts(), st.integers(1, 40))
def test_chunks_give_the_queries_of_the_whole_prompt(prompt, count):
    first, end, chunks, packed = prompt
    computed = torch.randn(LAYERS, end, HEADS, HEAD_SIZE)
    sample = QuerySample(LAYERS, HEADS, HEAD_SIZE, like=computed)
    begin, dropped = first, first
    for tokens, before in chunks:
        assert not sample.covers(dropped, end)
        others = torch.full((before, HEADS, HEAD_SIZE), 1e9)
        piece = sample.expect(begin, begin + tokens)
        piece.queries.fill_(torch.nan)
        assert not sample.covers(begin, begin + tokens)  # it has not been computed yet
        rows = CaptureRows(sample, piece, slice(before, before + tokens))
        for layer in range(LAYERS):
            rows.store(layer, torch.cat([others, computed[layer, begin : begin + tokens], others]))
        begin += tokens
        if begin > first + packed > dropped:
            dropped = first + packed
            sample.drop(dropped)
    assert sample.covers(dropped, end) and not sample.covers(dropped, end + 1)
    assert dropped == first or not sample.covers(dropped - 1, end)
    positions, _ = sample_positions(dropped, end, count)
    queries = sample.at(positions)
    assert queries.shape == computed[:, positions].shape
    layers, heads = torch.tensor([[1], [0], [1]]), torch.tensor([[0, 1], [2, 0], [1, 2]])
    assert torch.equal(queries[layers, :, heads], computed[:, positions][layers, :, heads])


def test_a_gap_is_not_covered():
    sample = QuerySample(LAYERS, HEADS, HEAD_SIZE, like=torch.empty(0))
    for first in (0, 10):
        sample.expect(first, first + 5).seen = True
    assert sample.covers(0, 5) and sample.covers(10, 15) and not sample.covers(0, 15)


class NoMemory:
    """What samples are allocated like, on a device that is full; and what they are written to then."""

    shape = (LAYERS, 20)

    def new_empty(self, *shape):
        raise RuntimeError("injected")

    __setitem__ = new_empty


def test_a_prompt_whose_queries_find_no_memory_is_not_sampled_and_says_why():
    sample = QuerySample(LAYERS, HEADS, HEAD_SIZE, like=NoMemory())
    assert sample.expect(0, 20) is None and sample.expect(20, 40) is None
    assert not sample.covers(0, 20) and "injected" in sample.failure


def test_a_copy_that_fails_ends_the_sampling_and_nothing_else():
    sample = QuerySample(LAYERS, HEADS, HEAD_SIZE, like=torch.empty(0))
    piece = sample.expect(0, 20)
    piece.queries = NoMemory()
    for layer in range(LAYERS):
        CaptureRows(sample, piece, slice(0, 20)).store(layer, torch.zeros(20, HEADS, HEAD_SIZE))
    assert not sample.covers(0, 20) and "injected" in sample.failure


def test_a_request_whose_compression_failed_in_this_step_is_sampled_no_more(monkeypatch):
    """Its next queries were expected, and then its sample was dropped: the others' are kept all the same."""
    monkeypatch.setattr(state, "row_request_ids", lambda runner, metadata: ["failed", "other"])
    own = object.__new__(state.CompressionState)
    own.geometry, own.pages = (
        SimpleNamespace(num_layers=LAYERS),
        SimpleNamespace(head_size=HEAD_SIZE, buffer=torch.zeros(1)),
    )
    own.dtype = torch.float32
    own.runner, own.num_query_heads, own.samples, own._expected = None, HEADS, {}, {}
    own._computed = {"failed": 8, "other": 8}
    for request_id in ("failed", "other"):
        own.sample(SampleCommand(request_id, 8, 12))
    del own.samples["failed"]
    (rows,) = own.capture_rows(SimpleNamespace(query_start_loc_cpu=torch.tensor([0, 4, 8])))
    assert rows.sample is own.samples["other"] and rows.source == slice(4, 8)
