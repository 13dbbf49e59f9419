"""KVzip's scores, against the attention that transformers itself reports."""

import sys

import pytest
import torch

from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.methods import METHODS
from kvsculpt_vllm.evaluation.methods.kvzip import GO_ON, SHOWN, reconstruction_scores
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.sculpt.effort import EFFORTS

VOCABULARY, BLOCK, SINKS, WINDOW, LENGTH = 97, 8, 4, 16, 160
WORDS = {"\n\nRepeat the previous context:": [5, 6], GO_ON: [7, 8, 9], ":": [10]}


@pytest.fixture
def context(tiny_llama):
    model = EvaluationModel(tiny_llama(2, 4, 2, VOCABULARY, 512), torch.float32, tokenize=WORDS.__getitem__)
    tokens = torch.randint(11, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    return Context(model, tokens, 8, EFFORTS["fast"], BLOCK, WINDOW, SINKS)


@pytest.mark.parametrize("chunk", [2000, 80])
def test_scores_are_the_most_attention_that_transformers_reports_while_the_context_is_repeated(
    context, tiny_llama, monkeypatch, chunk
):
    monkeypatch.setattr(sys.modules[reconstruction_scores.__module__], "CHUNK", chunk)
    network, tokens, expected = tiny_llama(2, 4, 2, VOCABULARY, 512), context.tokens, []
    network.set_attn_implementation("eager")
    cuts = [(0, 160)] if chunk == 2000 else [(0, 80), (80, 160)]
    for begin, end in cuts:
        fed = [5, 6] if begin == 0 else [7, 8, 9, *tokens[begin - SHOWN : begin], 10]
        fed += tokens[begin:end]
        with torch.no_grad():
            attentions = network(torch.tensor([[*tokens, *fed]]), output_attentions=True).attentions
        seen = [*range(min(SINKS, begin)), *range(begin, end), *range(LENGTH, LENGTH + len(fed))]
        for attention in attentions:
            rows = attention[0, :, LENGTH:][..., seen]
            rows = rows / rows.sum(-1, keepdim=True)
            first = min(SINKS, begin)
            most = rows[..., first : first + end - begin].amax(1)  # (query heads, entries)
            expected.append(most.unflatten(0, (2, 2)).amax(1))
    parts = len(cuts)
    whole = torch.cat([torch.cat(expected[i * 2 : i * 2 + 2]) for i in range(parts)], 1)
    span = context.span_blocks * BLOCK
    torch.testing.assert_close(reconstruction_scores(context), whole[:, SINKS:span], rtol=1e-3, atol=1e-5)


def test_adaptive_budgets_keep_the_pages_whose_scores_come_to_most_over_all_heads(context):
    scores = reconstruction_scores(context)
    (attempt,) = context.compress(METHODS["kvzip"], "adaptive", [0.2])
    kept = [len(keys) for keys in attempt.fitted.keys]
    best = scores.sort(1, descending=True).values
    # What the heads would gain by their next pages, in order: the first page is every head's.
    gains = sorted(
        (
            (-float(head[first : first + BLOCK].sum()), number)
            for number, head in enumerate(best)
            for first in range(BLOCK - SINKS, len(head), BLOCK)
        )
    )
    total = context.plan(0.2).total - len(scores)
    given = [1 + sum(number == b for _, number in gains[:total]) for b in range(len(scores))]
    assert kept == [pages * BLOCK - SINKS for pages in given]
    assert len(set(kept)) > 1
    for head, keys, order in zip(
        range(len(scores)), attempt.fitted.keys, scores.argsort(1, descending=True), strict=True
    ):
        whole = context.problems.keys[head, order[: len(keys)]]
        torch.testing.assert_close(keys.sum(0), whole.sum(0), rtol=1e-4, atol=1e-4)


def test_a_model_without_positions_for_the_repetition_is_refused(tiny_llama):
    model = EvaluationModel(tiny_llama(2, 4, 2, VOCABULARY, 200))
    short = Context(model, [11] * LENGTH, 8, EFFORTS["fast"], BLOCK, WINDOW, SINKS)
    with pytest.raises(ValueError, match="kvzip feeds 160 tokens behind a context of 160, and the model has 200"):
        next(short.compress(METHODS["kvzip"], "uniform", [0.4]))


def test_it_makes_no_segments(context):
    with pytest.raises(NotImplementedError, match="--segment 0"):
        next(context.compress(METHODS["kvzip"], "uniform", [0.4], segment=64))
