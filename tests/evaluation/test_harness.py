"""The harness cannot flatter: on a tiny model with random weights, against transformers' own attention and caches."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
)

from kvsculpt_vllm.evaluation.attention import RaggedCache
from kvsculpt_vllm.evaluation.continuation import Measurement, Trial
from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.methods import METHODS
from kvsculpt_vllm.evaluation.metrics import compare, summarise
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.evaluation.results import Results
from kvsculpt_vllm.evaluation.texts import passages
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.options import METHODS as OURS
from kvsculpt_vllm.sculpt.selection import rank

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HEADS, KV_HEADS, VOCABULARY = 2, 4, 2, 97
CONTEXT, CONTINUATION, CONTEXTS, BLOCK, WINDOW, SINKS = 200, 24, 3, 8, 16, 4
SPAN_BLOCKS = (CONTEXT - WINDOW) // BLOCK
EFFORT = Effort(
    positions=80, pilot_positions=60, fit_positions=250, key_steps=10
)  # so small a model is asked from all 200 positions, and from the last 50 as they were: fits are to all of them


@pytest.fixture(scope="module")
def make_model(tiny_llama):
    return lambda: tiny_llama(LAYERS, HEADS, KV_HEADS, VOCABULARY, positions=1024)


@pytest.fixture(scope="module")
def plain(make_model):
    """The model as transformers runs it."""
    return make_model()


@pytest.fixture(scope="module")
def chosen():
    tokens = torch.randint(VOCABULARY, (900,), generator=torch.Generator().manual_seed(1)).tolist()
    return passages(tokens, CONTEXT, CONTINUATION, CONTEXTS, seed=0)


@pytest.fixture(scope="module")
def trials(make_model, chosen):
    model = EvaluationModel(make_model())
    return [
        Trial(Context(model, passage.context, CONTINUATION, EFFORT, BLOCK, WINDOW, SINKS), passage)
        for passage in chosen
    ]


def measure(trials, method, budget, keep_ratio):
    return [next(trial.measure(METHODS[method], budget, [keep_ratio])) for trial in trials]


def kl(measurements):
    return summarise([measurement.scores for measurement in measurements])["kl_mean"]


@torch.no_grad()
def test_the_full_cache_gives_the_logits_of_the_plain_model(make_model, plain, chosen):
    passage = chosen[0]
    expected = plain(torch.tensor([passage.context + passage.continuation])).logits[0, CONTEXT:]
    model = EvaluationModel(make_model(), storage=torch.float32)
    recording = model.record(passage.context, torch.tensor([0]))
    cache = RaggedCache(list(recording.keys), list(recording.values), torch.float32)
    torch.testing.assert_close(model.continue_from(cache, passage.continuation, CONTEXT), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_heads_with_different_entries_give_the_logits_of_the_plain_model_that_masks_the_others(
    make_model, plain, chosen
):
    passage = chosen[1]
    generator = torch.Generator().manual_seed(2)
    kept = [torch.randperm(CONTEXT, generator=generator)[:size] for size in (150, 37)]  # by KV head, in any order
    hidden = torch.ones(HEADS, CONTINUATION, CONTEXT + CONTINUATION, dtype=torch.bool).triu_(CONTEXT + 1)
    for head in range(HEADS):
        hidden[head, :, :CONTEXT] = True
        hidden[head, :, kept[head // (HEADS // KV_HEADS)]] = False
    past = DynamicCache()
    plain(torch.tensor([passage.context]), past_key_values=past)
    expected = plain(
        torch.tensor([passage.continuation]),
        attention_mask=torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[None],
        position_ids=torch.arange(CONTEXT, CONTEXT + CONTINUATION)[None],
        past_key_values=past,
    ).logits[0]

    model = EvaluationModel(make_model(), storage=torch.float32)
    recording = model.record(passage.context, torch.tensor([0]))
    index = [kept[b % KV_HEADS] for b in range(LAYERS * KV_HEADS)]
    cache = RaggedCache(
        [keys[chosen] for keys, chosen in zip(recording.keys, index, strict=True)],
        [values[chosen] for values, chosen in zip(recording.values, index, strict=True)],
        torch.float32,
    )
    torch.testing.assert_close(model.continue_from(cache, passage.continuation, CONTEXT), expected, rtol=0, atol=1e-4)


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "layer_types": ["full_attention"] * LAYERS,
}


def make_gemma2():
    """A model with a soft cap, well below its largest logits."""
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, query_pre_attn_scalar=16, attn_logit_softcapping=3.0, attn_implementation="eager")
    return Gemma2ForCausalLM(config).eval()


def make_gpt_oss():
    """A model with learned sinks, each of which takes another share."""
    torch.manual_seed(0)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
    config = GptOssConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, rope_parameters=yarn, attn_implementation="eager"
    )
    model = GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(4.0, 2.0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("make", [make_gemma2, make_gpt_oss], ids=["soft cap", "learned sinks"])
def test_caps_and_learned_sinks_are_those_of_the_plain_model_and_of_its_problems(make, chosen):
    passage = chosen[0]
    expected = make()(torch.tensor([passage.context + passage.continuation])).logits[0, CONTEXT:]
    model = EvaluationModel(make(), storage=torch.float32)
    context = Context(model, passage.context, CONTINUATION, EFFORT, BLOCK, WINDOW, SINKS)
    logits = model.continue_from(context.full_cache, passage.continuation, CONTEXT)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)

    # What the last query of the window was answered as it was asked, by a softmax over all that is before it.
    problems, recording, end = context.problems, context.recording, SPAN_BLOCKS * BLOCK + WINDOW
    taught = rank(problems, 1 << 20)
    for b in range(LAYERS * KV_HEADS):
        layer, head = divmod(b, KV_HEADS)
        for i in range(HEADS // KV_HEADS):
            query = recording.queries[layer, -1, head * (HEADS // KV_HEADS) + i].double()
            scores = recording.keys[b, :end].double() @ query * recording.scale
            if recording.soft_cap is not None:
                scores = recording.soft_cap * torch.tanh(scores / recording.soft_cap)
            if recording.sink_logits is not None:
                scores = torch.cat([scores, recording.sink_logits[layer, head * 2 + i, None].double()])
            row = i - HEADS // KV_HEADS
            torch.testing.assert_close(taught.teacher_lse[b, row].double(), scores.logsumexp(0), rtol=1e-4, atol=1e-4)
    lost = {}
    for name in ("sculpt", "attention_matching", "snapkv", "random"):
        (attempt,) = context.compress(METHODS[name], "adaptive", [0.5])
        given = model.continue_from(attempt.cache, passage.continuation, CONTEXT).log_softmax(-1)
        exact = expected.log_softmax(-1)
        lost[name] = float((exact.exp() * (exact - given)).sum(-1).mean())
    assert max(lost["sculpt"], lost["attention_matching"]) < lost["snapkv"] < lost["random"]


def make_glm():
    """A model that turns neighbours, and only half of each head."""
    config = GlmConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        max_position_embeddings=1024,
        pad_token_id=0,
    )
    return GlmForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "glm"])
def test_recorded_queries_are_those_the_model_asks_and_move_with_its_rotary_embedding(make_model, chosen, architecture):
    model = EvaluationModel(make_model() if architecture == "llama" else make_glm(), storage=torch.float32)
    tokens = [chosen[0].context[0]] * CONTEXT  # one token everywhere: layer 0 asks the same at every position
    recording = model.record(tokens, torch.tensor([3, 50, 199]))
    queries = recording.queries[0]
    moved = model.rotary.move(queries[:1].expand(3, -1, -1), torch.tensor([3, 3, 3]), torch.tensor([3, 50, 199]))
    torch.testing.assert_close(moved, queries, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if not name.endswith("fp8")])
def test_keeping_everything_changes_nothing(trials, method):
    measurements = measure(trials[:1], method, "uniform", 1.0)
    assert measurements[0].kept_fraction == 1
    assert abs(kl(measurements)) < 1e-6
    assert measurements[0].scores.agree.all()


@pytest.mark.parametrize("budget", ["uniform", "adaptive"])
def test_kept_fraction_is_what_was_asked_and_the_same_for_all_methods(trials, budget):
    pages = -(-3 * SPAN_BLOCKS // 10)
    asked = (pages * BLOCK + CONTEXT - SPAN_BLOCKS * BLOCK) / CONTEXT
    for method in METHODS:
        assert measure(trials[:1], method, budget, 0.3)[0].kept_fraction == pytest.approx(asked)


def test_random_selection_is_the_worst_and_another_contexts_cache_is_far_worse_than_any_method(trials):
    results = {method: kl(measure(trials, method, "adaptive", 0.5)) for method in METHODS}
    by_chance = results.pop("random")
    assert by_chance > max(results.values())
    # Random weights make all keys alike and neighbours unrelated, so other peers have little to go by.
    informed = [results[method] for method in (*OURS, "attention_matching")]
    assert by_chance > 1.5 * max(informed)
    swapped = [
        trial.score(other.context.full_cache) for trial, other in zip(trials, trials[1:] + trials[:1], strict=True)
    ]
    assert summarise(swapped)["kl_mean"] > max(by_chance, 3 * max(informed))


def test_a_bias_of_log_2_counts_a_key_twice(trials):
    recording = trials[0].context.recording
    twice = RaggedCache(
        [torch.cat([keys, keys[50:90]]) for keys in recording.keys],
        [torch.cat([values, values[50:90]]) for values in recording.values],
        torch.bfloat16,
    )
    biases = torch.zeros(CONTEXT)
    biases[50:90] = torch.tensor(2.0).log()
    biased = dataclasses.replace(trials[0].context.full_cache, biases=[biases] * len(recording.keys))
    exact, other = trials[0].score(twice), trials[0].score(biased)
    assert exact.kl.mean() > 1e-3
    np.testing.assert_allclose(other.kl, exact.kl, rtol=1e-3)


@pytest.mark.parametrize("method", ["attention_matching", "attention_matching_omp"])
def test_attention_matching_finds_the_masses_that_no_other_weights_come_closer_to(trials, method):
    problems = trials[0].context.problems
    fitted = METHODS[method](problems, trials[0].context.plan(0.3), "uniform", EFFORT)(trials[0].context.plan(0.3))
    train = ~problems.held_out
    for b, bias in enumerate(fitted.biases):
        queries = problems.queries[b, train].double() * problems.scale
        mass = (queries @ problems.keys[b].double().T).exp().sum(-1)
        total = mass + problems.retained_lse[b, train].double().exp()
        features = (queries @ fitted.keys[b].double().T).exp() / total[:, None]
        weights = bias.double().exp()
        miss = features @ weights - mass / total
        before = features.sum(-1) - mass / total
        assert miss.square().sum() < before.square().sum()
        # Karush-Kuhn-Tucker: more of an entry never helps, and less only where there is none.
        gradient = features.T @ miss / (features.T @ (mass / total)).max()
        assert gradient.min() > -5e-3 and gradient[weights > 1e-3].max() < 5e-3


def test_snapkv_keeps_the_neighbourhoods_that_the_last_queries_attend_to(trials):
    problems, plan = trials[0].context.problems, trials[0].context.plan(0.3)
    kept = METHODS["snapkv"](problems, plan, "uniform", EFFORT)(plan).keys
    for b, keys in enumerate(problems.keys.double()):
        queries = problems.queries[b, -problems.recent * problems.group :].double() * problems.scale
        logits = torch.cat([queries @ keys.T, problems.retained_lse[b, -len(queries) :, None].double()], dim=1)
        attention = logits.softmax(1)[:, :-1].sum(0).tolist()
        pooled = torch.tensor([max(attention[max(0, j - 3) : j + 4]) for j in range(len(attention))])
        expected = pooled.topk(len(kept[b])).values.sum()
        chosen = [row.tolist() in kept[b].tolist() for row in problems.keys[b]]
        torch.testing.assert_close(pooled[torch.tensor(chosen)].sum(), expected, rtol=1e-4, atol=0)


def test_expected_attention_is_the_mean_of_the_exponential_over_gaussian_queries(trials):
    problems, plan = trials[0].context.problems, trials[0].context.plan(0.3)
    kept = METHODS["expected_attention"](problems, plan, "uniform", EFFORT)(plan).keys
    future = problems.queries.shape[1] // problems.group - problems.recent
    for b, keys in enumerate(problems.keys.double()):
        score = 0
        for head in range(problems.group):
            queries = problems.queries[b, head :: problems.group][:future].double() * problems.scale
            gaussian = torch.distributions.MultivariateNormal(
                queries.mean(0), torch.cov(queries.T, correction=0) + 1e-9 * torch.eye(queries.shape[1])
            )
            # log E e^(q·k) of a normal q·k with mean μ·k and variance kᵀΣk
            log_mean = keys @ gaussian.mean + torch.einsum("nd,de,ne->n", keys, gaussian.covariance_matrix, keys) / 2
            score = score + log_mean.softmax(0) * problems.values[b].double().norm(dim=1)
        chosen = torch.tensor([row.tolist() in kept[b].tolist() for row in problems.keys[b]])
        torch.testing.assert_close(score[chosen].sum(), score.topk(len(kept[b])).values.sum(), rtol=1e-3, atol=0)


def test_scores_are_the_formulas_written_out():
    full, other = torch.randn(2, 70, 5, generator=torch.Generator().manual_seed(3))
    following = [i % 5 for i in range(70)]
    scores = compare(full, other, following)
    p, q = full.double().softmax(-1), other.double().softmax(-1)
    rows = torch.arange(70)
    np.testing.assert_allclose(scores.kl, (p * (p / q).log()).sum(-1))
    np.testing.assert_allclose(scores.nll_full, -p[rows, following].log())
    np.testing.assert_allclose(scores.nll, -q[rows, following].log())
    np.testing.assert_array_equal(scores.agree, p.argmax(-1) == q.argmax(-1))


def test_passages_do_not_overlap_and_depend_on_the_seed_only():
    tokens = list(range(1000))
    first = passages(tokens, 100, 20, 4, seed=0, prefix=[7777])
    assert (
        first
        == passages(tokens, 100, 20, 4, seed=0, prefix=[7777])
        != passages(tokens, 100, 20, 4, seed=1, prefix=[7777])
    )
    for passage in first:
        assert len(passage.context) == 100 and len(passage.continuation) == len(passage.following) == 20
        text = [*passage.context[1:], *passage.continuation, passage.following[-1]]
        assert passage.context[0] == 7777 and text == list(range(passage.start, passage.start + 120))
        assert passage.following[:-1] == passage.continuation[1:]
    assert [passage.start // 250 for passage in first] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="do not fit"):
        passages(tokens, 300, 40, 3, seed=0)


def test_an_interrupted_run_goes_on_and_changed_code_is_measured_again(trials, tmp_path):
    path, key = tmp_path / "out.json", ("select", "uniform", 0.3)
    one, two = measure(trials[:2], *key)

    Results(path, {"seed": 0, "code": "a"}, 2, Measurement).add(key, 1, two)
    with (tmp_path / "out.json.parts").open("a") as file:
        file.write('{"settings": {"se')  # killed while writing
    again = Results(path, {"seed": 0, "code": "a"}, 2, Measurement)
    assert again.missing(key) == [0]
    again.add(key, 0, one)
    again.close([key])
    assert again.missing(key) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]
    (row,) = json.loads(path.read_text())
    assert row["kl_mean"] == pytest.approx(kl([one, two])) and row["kl_per_context"] == [kl([one]), kl([two])]

    changed = Results(path, {"seed": 0, "code": "b"}, 2, Measurement)
    assert changed.missing(key) == [0, 1]
    for context, measurement in enumerate([two, one]):
        changed.add(key, context, measurement)
    (row,) = json.loads(path.read_text())
    assert row["settings"]["code"] == "b" and row["kl_per_context"] == [kl([two]), kl([one])]


def test_only_rows_that_follow_a_calibration_are_measured_again_with_another(trials, tmp_path):
    keys = [("sculpt", "adaptive", 0.3), ("sculpt", "uniform", 0.3), ("select", "adaptive", 0.3)]
    (one,) = measure(trials[:1], "select", "uniform", 0.3)
    first = Results(tmp_path / "out.json", {"calibration": "first"}, 1, Measurement)
    for key in keys:
        first.add(key, 0, one)
    second = Results(tmp_path / "out.json", {"calibration": "second"}, 1, Measurement)
    assert [second.missing(key) for key in keys] == [[0], [0], []]
    assert [first.row(key)["settings"]["calibration"] for key in keys] == ["first", "first", "none"]
