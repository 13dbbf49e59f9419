"""Layers that see a window beside those that see everything: a tiny Gemma 3 with random weights, against transformers'
own attention and masks.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
)
from transformers import MistralForCausalLM as Mistral

from kvsculpt_vllm.evaluation import windows
from kvsculpt_vllm.evaluation.calibrate import LENGTHS, curves, second_curves
from kvsculpt_vllm.evaluation.chain import Chain
from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.methods import METHODS
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.evaluation.second_reading import SecondReading
from kvsculpt_vllm.sculpt.effort import Effort

from .test_chain import keep_all

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, LENGTH, FOLLOWING, BLOCK, SEEN = 97, 205, 24, 8, 20
KINDS = 2 * ["sliding_attention", "sliding_attention", "full_attention"]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": len(KINDS),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "sliding_window": SEEN,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
EFFORT = Effort(positions=80, pilot_positions=60, fit_positions=250, key_steps=2)


def gemma():
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=16, layer_types=KINDS)
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCABULARY, (LENGTH + FOLLOWING,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def expected(tokens):
    with torch.no_grad():
        return gemma()(torch.tensor([tokens])).logits[0]


@pytest.fixture
def in_pieces(monkeypatch):
    """Several rows at once, and not all of them."""
    monkeypatch.setattr(windows, "ROWS", 7)


def context_of(model, tokens):
    return Context(model, tokens[:LENGTH], FOLLOWING, EFFORT, BLOCK, window=16, sinks=4)


@pytest.mark.usefixtures("in_pieces")
def test_the_full_cache_gives_the_logits_of_the_plain_model(tokens, expected):
    model = EvaluationModel(gemma(), storage=torch.float32)
    context = context_of(model, tokens)
    assert model.num_layers == 2 and len(context.recording.keys) == 4
    assert [keys.shape[1] for keys, _ in context.recording.windows] == 4 * [SEEN - 1]
    found = model.continue_from(context.full_cache, tokens[LENGTH:], LENGTH)
    torch.testing.assert_close(found, expected[LENGTH:], rtol=0, atol=1e-4)
    other = dataclasses.replace(context.full_cache, windows=[(0 * k, 0 * v) for k, v in context.full_cache.windows])
    assert (model.continue_from(other, tokens[LENGTH:], LENGTH) - found).abs().max() > 0.1


@pytest.mark.usefixtures("in_pieces")
def gemma2():
    torch.manual_seed(0)
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": None, "attn_implementation": "eager"}
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **caps, head_dim=16, layer_types=KINDS)).eval()


def gpt_oss():
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": ROPE}
    config = GptOssConfig(**SIZES, **experts, head_dim=16, layer_types=KINDS, attn_implementation="eager")
    model = GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(2.0, 2.0)
    return model


@torch.no_grad()
@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("make", [gemma2, gpt_oss])
def test_windows_have_the_models_caps_and_sinks(tokens, make):
    expected = make()(torch.tensor([tokens])).logits[0, LENGTH:]
    model = EvaluationModel(make(), storage=torch.float32)
    context = context_of(model, tokens)
    assert len(context.recording.windows) == 4
    logits = model.continue_from(context.full_cache, tokens[LENGTH:], LENGTH)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


def test_an_answer_is_the_plain_models(tokens):
    model, plain = EvaluationModel(gemma(), storage=torch.float32), gemma()
    plain.generation_config.eos_token_id = None
    context = context_of(model, tokens)
    asked = torch.tensor([tokens[: LENGTH + 3]])
    with torch.no_grad():
        answer = plain.generate(asked, max_new_tokens=30, do_sample=False)[0, LENGTH + 3 :].tolist()
    for draft in ((), answer[:10], [*answer[:5], 1, 2]):
        assert model.answer(context.full_cache, tokens[LENGTH : LENGTH + 3], LENGTH, 30, draft) == answer


def test_segments_that_are_kept_whole_are_the_full_cache(tokens):
    model = EvaluationModel(gemma(), storage=torch.float32)
    context = context_of(model, tokens)
    cuts = context.pieces(0.3, 64)
    assert len(cuts) == 3
    made = Chain(model, tokens[:LENGTH], EFFORT, BLOCK, 16, 4).make(cuts, keep_all, "uniform").cache
    for exact, found in ((context.recording.keys, made.keys), (context.recording.values, made.values)):
        torch.testing.assert_close(torch.stack(found), exact, rtol=0, atol=1e-4)
    for pair, other in zip(made.windows, context.recording.windows, strict=True):
        torch.testing.assert_close(pair, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("segment", [0, 64])
def test_only_what_the_full_layers_keep_is_compressed(tokens, segment):
    context = context_of(EvaluationModel(gemma()), tokens)
    (attempt,) = context.compress(METHODS["sculpt"], "adaptive", [0.3], segment)
    assert len(attempt.fitted.keys) == 4 and attempt.kept_fraction < 0.5
    assert all(keys.shape[1] == SEEN - 1 for keys, _ in attempt.cache.windows)
    logits = context.model.continue_from(attempt.cache, tokens[LENGTH:], LENGTH)
    exact = context.model.continue_from(context.full_cache, tokens[LENGTH:], LENGTH)
    assert logits.isfinite().all() and (logits - exact).abs().max() > 0


def test_queries_move_with_the_rotary_embedding_of_the_layers_that_are_compressed():
    model = EvaluationModel(gemma(), storage=torch.float32)
    positions = torch.tensor([3, 50, 199])
    queries = model.record([5] * 200, positions).queries
    for rotary, asked in zip(model.rotaries, queries, strict=True):
        moved = rotary.move(asked[:1].expand(3, -1, -1), positions[:1].expand(3), positions)
        torch.testing.assert_close(moved, asked, rtol=0, atol=1e-4)


def test_a_calibration_has_curves_of_the_layers_that_are_compressed(tokens):
    text = [*tokens, *tokens[:1:-1], *tokens, *tokens[::2]]
    model = EvaluationModel(gemma())
    length = len(text) // LENGTHS
    reading = SecondReading(model, text[:length], 0)
    for kinds, losses in (
        (2, curves(model, text, "fast", None)[2]),
        (1, second_curves(model, reading, length, "fast")[2]),
    ):
        assert losses.shape[:2] == (kinds, 4) and (losses >= 0).all() and losses.max() > 0


def test_layers_without_positions_are_told_from_those_with():
    torch.manual_seed(0)
    model = EvaluationModel(Cohere2ForCausalLM(Cohere2Config(**SIZES, layer_types=KINDS)))
    assert model.rotaries == [None, None]  # Command R7B turns only the layers that have a window


def test_a_model_that_sees_nothing_but_windows_is_refused():
    with pytest.raises(NotImplementedError, match="another window"):
        EvaluationModel(Mistral(MistralConfig(**SIZES)))
