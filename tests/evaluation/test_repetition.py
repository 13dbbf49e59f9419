"""A prompt that repeats one token asks the same everywhere: what is kept must not be made for that question alone."""

from __future__ import annotations

import pytest
import torch

from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.methods import METHODS
from kvsculpt_vllm.evaluation.model import EvaluationModel, load_tokenizer
from kvsculpt_vllm.sculpt.effort import Effort

PROMPT, WINDOW, SINKS, BLOCK = 300, 64, 4, 32
QUESTION = "\n\nThe word above was repeated many times. Which word is it?"
EFFORT = Effort(positions=PROMPT, pilot_positions=64, fit_positions=PROMPT, key_steps=5)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def asked(model_path):
    """A context of one token, and the queries (L · KV heads, Q, D) of a question that follows it, in float64."""
    model = EvaluationModel.load(model_path, "cpu")
    tokenizer, _ = load_tokenizer(model_path)
    token, question = (tokenizer(text, add_special_tokens=False).input_ids for text in (" the", QUESTION))
    tokens = token * PROMPT
    context = Context(model, tokens, len(question), EFFORT, BLOCK, WINDOW, SINKS)
    recording = model.record([*tokens, *question], torch.arange(PROMPT, PROMPT + len(question)))
    kv_heads = len(recording.keys) // model.num_layers
    queries = recording.queries.unflatten(2, (kv_heads, -1)).permute(0, 2, 1, 3, 4)  # (L, KV heads, T, group, D)
    return context, queries.flatten(2, 3).flatten(0, 1).double() * recording.scale


def log_sum_exp_errors(context, queries, method):
    """Squared errors per head over the cached entries, as the question sees them, and what the method reported."""
    attempt = next(context.compress(METHODS[method], "uniform", [0.3]))
    pairs = zip(queries, attempt.cache.keys, context.full_cache.keys, strict=True)
    errors = [
        ((q @ kept.double().T).logsumexp(-1) - (q @ full.double().T).logsumexp(-1)).square().mean()
        for q, kept, full in pairs
    ]
    return torch.stack(errors), attempt.fitted


def test_an_answers_queries_find_the_mass_that_selection_keeps_after_one_token_repeated(asked):
    selected, _ = log_sum_exp_errors(*asked, "select")
    sculpted, fitted = log_sum_exp_errors(*asked, "sculpt")
    assert sculpted.mean() < selected.mean()
    assert (sculpted < selected + 0.1).all()
    # And the report says what the answer will meet: of the mass, as all values are the same here.
    assert float(fitted.error.mean()) > 0.5 * float(sculpted.mean())
