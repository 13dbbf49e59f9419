"""A context compressed segment by segment, on a tiny model with random weights."""

from __future__ import annotations

import pytest
import torch

from kvsculpt_vllm.evaluation.chain import Chain
from kvsculpt_vllm.evaluation.continuation import Measurement
from kvsculpt_vllm.evaluation.harness import ONE_SPAN, Context
from kvsculpt_vllm.evaluation.methods import METHODS
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.evaluation.results import Results
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import Compressed
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.options import METHODS as OURS

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, LENGTH, BLOCK, WINDOW, SINKS, SEGMENT = 97, 205, 8, 16, 4, 64
EFFORT = Effort(positions=80, pilot_positions=60, fit_positions=250, key_steps=2)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return EvaluationModel(tiny_llama(2, 4, 2, VOCABULARY, positions=512))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def context(model, tokens):
    return Context(model, tokens, 24, EFFORT, BLOCK, WINDOW, SINKS)


def chain_of(model, tokens):
    return Chain(model, tokens, EFFORT, BLOCK, WINDOW, SINKS)


def keep_all(problems, plan, budget, effort):
    """A method that replaces every segment by itself."""
    none = torch.zeros(problems.num_problems)
    return lambda plan: Compressed(
        problems.num_problems * [plan.span_pages],
        list(problems.keys),
        list(problems.values),
        none,
        none,
        none.long(),
        none.long(),
        none,
        torch.zeros(0, 2, len(none)),
    )


def test_segments_that_are_kept_whole_are_the_full_cache(tiny_llama, tokens):
    model = EvaluationModel(tiny_llama(2, 4, 2, VOCABULARY, positions=512), storage=torch.float32)
    context = Context(model, tokens, 24, EFFORT, BLOCK, WINDOW, SINKS)
    cuts = context.pieces(0.3, SEGMENT)
    assert len(cuts) == 3
    made = chain_of(model, tokens).make(cuts, keep_all, "uniform")
    for exact, found in ((context.recording.keys, made.cache.keys), (context.recording.values, made.cache.values)):
        torch.testing.assert_close(torch.stack(found), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", OURS)
def test_a_chain_keeps_what_its_plan_says(context, method):
    (attempt,) = context.compress(METHODS[method], "adaptive", [0.3], SEGMENT)
    cuts = context.pieces(0.3, SEGMENT)
    kept = sum(piece.packed_blocks for piece in cuts) * BLOCK + LENGTH - cuts[-1].end * BLOCK
    assert attempt.kept_fraction == pytest.approx(kept / LENGTH)
    assert sum(attempt.fitted.pages) == sum(piece.packed_blocks for piece in cuts) * len(attempt.fitted.pages)


def test_a_chain_of_one_segment_is_the_compression_of_one_span(model, tokens, context):
    (span,) = context.compress(METHODS["sculpt"], "adaptive", [0.3], ONE_SPAN)
    made = chain_of(model, tokens).make(context.pieces(0.3, 10 * SEGMENT), METHODS["sculpt"], "adaptive")
    (segment,) = made.segments
    for ours, theirs in zip([*span.fitted.keys, *span.fitted.values], [*segment.keys, *segment.values], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_segment_depends_on_nothing_behind_its_window(model, tokens, context):
    cuts = context.pieces(0.3, SEGMENT)[:2]
    seen = cuts[-1].end * BLOCK + WINDOW
    others = tokens[:seen] + [(token + 1) % VOCABULARY for token in tokens[seen:]]
    one, other = (chain_of(model, text).make(cuts, METHODS["select_fit"], "uniform") for text in (tokens, others))
    for mine, theirs in zip(one.segments, other.segments, strict=True):
        torch.testing.assert_close(torch.stack(mine.values), torch.stack(theirs.values))


def test_what_follows_a_segment_is_computed_from_it(model, tokens, context):
    made = chain_of(model, tokens).make(context.pieces(0.3, SEGMENT)[:1], METHODS["select"], "uniform")
    exact, found = (
        context.recording.keys[:, SEGMENT:],
        torch.stack([keys[-(LENGTH - SEGMENT) :] for keys in made.cache.keys]),
    )
    first_layer, second_layer = (found - exact).abs().amax((-1, -2)).view(2, 2)
    assert first_layer.max() < 1e-3 < second_layer.min()
    # The window behind the segment was there before it.
    torch.testing.assert_close(found[:, :WINDOW], exact[:, :WINDOW])


def test_segments_are_asked_what_precedes_them_too(model, tokens, context):
    """With everything kept, what a later segment must reproduce is the attention over the whole context."""
    seen = []

    def spy(problems, plan: PagePlan, budget, effort):
        seen.append(problems)
        return keep_all(problems, plan, budget, effort)

    chain_of(model, tokens).make(context.pieces(0.3, SEGMENT), spy, "uniform")
    recording, last = context.recording, seen[-1]
    rows = last.queries[:, -last.group :]  # the last position of the window, asked as it was
    logits = rows.float() @ recording.keys[:, : context.span_blocks * BLOCK + WINDOW].float().mT * last.scale
    own = (rows.float() @ last.keys.float().mT * last.scale).logsumexp(-1)
    found = torch.logaddexp(own, last.retained_lse[:, -last.group :])
    torch.testing.assert_close(found, logits.logsumexp(-1), rtol=0, atol=0.02)  # bfloat16, in another order


def test_rows_of_other_segments_are_apart_and_peers_have_none(context, tmp_path):
    rows = [Results(tmp_path / "out.json", {"segment": segment}, 1, Measurement) for segment in (2048, 1024)]
    assert [result._settings_of(("sculpt", "adaptive", 0.3))["segment"] for result in rows] == [2048, 1024]
    assert [result._settings_of(("snapkv", "adaptive", 0.3))["segment"] for result in rows] == [0, 0]
