"""What judges fits against transformers' own attention; the average is that of single contexts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from kvsculpt_vllm.calibration_file import FILE, read
from kvsculpt_vllm.cli import app
from kvsculpt_vllm.evaluation.answers import Answers
from kvsculpt_vllm.evaluation.calibrate import (
    BLOCK_SIZE,
    COMPARED_AT,
    FRACTIONS,
    LENGTHS,
    curves,
    fractions_of,
    judged_by,
    layer_weights,
    plan_of,
    second_curves,
    shares,
    what_follows,
)
from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.methods.base import surveyed
from kvsculpt_vllm.evaluation.model import EvaluationModel, load_tokenizer
from kvsculpt_vllm.evaluation.second_reading import Foreteller, SecondReading
from kvsculpt_vllm.evaluation.texts import DOCSTRINGS, passages, read_text
from kvsculpt_vllm.sculpt.budgets import PagePlan, grid_of
from kvsculpt_vllm.sculpt.effort import EFFORTS
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.queries import build_problems
from kvsculpt_vllm.sculpt.selection import teach

LAYERS, HEADS, KV_HEADS, WORDS = 2, 4, 2, 50
CONTEXT, SPAN, SINKS = 150, 64, 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_llama):
    """A tiny model with random weights, whose words are numbers."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(LAYERS, HEADS, KV_HEADS, WORDS, positions=640).save_pretrained(path)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(WORDS)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


@torch.no_grad()
def test_what_follows_asks_as_the_model_does_and_sees_all_that_is_before_it(directory):
    tokens = torch.randint(WORDS, (CONTEXT,), generator=torch.Generator().manual_seed(3)).tolist()
    positions = torch.tensor([SPAN + 1, SPAN + 20, CONTEXT - 1])
    model = EvaluationModel.load(directory, "cpu")
    model.storage = torch.float32
    recording = model.record(tokens, torch.arange(CONTEXT))
    problems = what_follows(recording, positions, 0, SPAN, SINKS)
    assert problems.held_out.all()
    found = teach(problems.take(torch.arange(LAYERS * KV_HEADS)), 1 << 20)

    plain = LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager")
    told = plain(torch.tensor([tokens]), output_attentions=True, use_cache=True)
    for layer in range(LAYERS):
        values = told.past_key_values.layers[layer].values[0].repeat_interleave(HEADS // KV_HEADS, 0)
        expected = told.attentions[layer][0][:, positions] @ values  # (heads, positions, D)
        own = slice(layer * KV_HEADS, (layer + 1) * KV_HEADS)
        by_head = found.out[own].unflatten(1, (len(positions), HEADS // KV_HEADS)).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(by_head, expected, rtol=0, atol=1e-4)


def test_fits_to_the_prompts_queries_are_judged_by_those_that_follow(directory):
    tokens = torch.randint(WORDS, (CONTEXT,), generator=torch.Generator().manual_seed(4)).tolist()
    model = EvaluationModel.load(directory, "cpu")
    model.storage = torch.float32
    own, positions = torch.arange(SPAN + 8), torch.arange(SPAN + 8, CONTEXT)
    recording = model.record(tokens, torch.arange(CONTEXT))
    problems = build_problems(
        recording.queries[:, own],
        own,
        8,
        recording.keys[:, : SPAN + 8],
        recording.values[:, : SPAN + 8],
        SPAN,
        SINKS,
        LAYERS * [model.rotary],
        recording.scale,
    )
    judges = what_follows(recording, positions, 0, SPAN, SINKS)
    plan = PagePlan(8, SPAN // 8, 0, SINKS)
    losses = judged_by(problems, judges, plan, EFFORTS["fast"], 2)
    assert losses.shape == (LAYERS * KV_HEADS, len(grid_of(plan, FRACTIONS)))
    assert (losses[:, -1] == 0).all() and (losses[:, :-1] > 0).all()

    # Judges that see nothing of the span but its share of nothing lose nothing, whatever is kept.
    elsewhere = replace(judges, retained_lse=judges.retained_lse + 1e4)
    assert np.abs(judged_by(problems, elsewhere, plan, EFFORTS["fast"], 2)).max() < 1e-6


def test_the_command_writes_the_mean_of_the_contexts_where_servers_look(directory, tmp_path):
    length = LENGTHS * CONTEXT
    words = torch.randint(WORDS, (3 * (length + 1),), generator=torch.Generator().manual_seed(2)).tolist()
    text = tmp_path / "numbers.txt"
    text.write_text(" ".join(map(str, words)))
    arguments = ["calibrate", "--model", directory, "--text", text, "--context", CONTEXT, "--num-contexts", 3]
    arguments += ["--second-reading", 0.5]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(directory / FILE)]

    file = read(directory / FILE)
    assert (file.model, file.texts, file.second_weight) == (directory.name, {"numbers.txt": 3}, 0.5)
    model = EvaluationModel.load(directory, "cpu")
    # Three contexts fill the text, whatever the seed.
    contexts = [words[i * (length + 1) :][:length] for i in range(3)]
    readings = [SecondReading(model, tokens[:CONTEXT], 0) for tokens in contexts]
    foreteller = Foreteller()
    plan = plan_of(CONTEXT)
    for reading in readings:
        foreteller.add(reading, plan.span_pages * plan.block_size, plan.sinks)
    without_prose = foreteller.maps()
    tokenizer, _ = load_tokenizer(directory)
    prose = tokenizer(read_text(DOCSTRINGS), add_special_tokens=False).input_ids
    for passage in passages(prose, CONTEXT, 0, 3, 0):
        foreteller.add(SecondReading(model, passage.context, 0), plan.span_pages * plan.block_size, plan.sinks)
    assert file.query_maps == foreteller.maps() != without_prose
    maps = file.whole.query_maps
    assert maps.heads  # heads of random weights do copy
    found = [curves(model, tokens, "balanced", maps) for tokens in contexts]
    assert (found[0][2] != curves(model, contexts[0], "balanced", None)[2]).any()
    again = [second_curves(model, of, CONTEXT, "balanced") for of in readings]
    fractions = fractions_of(plan)
    # What follows, and the context again: so short a one from its first token on.
    answers = [
        Answers(
            model,
            tokens[:CONTEXT],
            [tokens[CONTEXT : 2 * CONTEXT + 1], tokens[:CONTEXT]],
            EFFORTS["balanced"],
            BLOCK_SIZE,
        )
        for tokens in contexts
    ]
    means = {
        power: np.concatenate([np.mean([of[power] for of in kind], axis=0) for kind in (found, again)])
        for power in (1, 2)
    }
    ranked = {
        power: LossCurves(fractions, (mean[0] + mean[2]) / 2, power=power, query_maps=maps)
        for power, mean in means.items()
    }
    lost = {power: sum(one.lost(COMPARED_AT, by)[0] for one in answers) for power, by in ranked.items()}
    # By the ranking with which the answers lose less.
    assert file.whole.power == file.power == min(lost, key=lost.__getitem__) and lost[1] != lost[2]
    assert file.fractions == fractions
    alone = np.mean([one.lost_by_layer(COMPARED_AT, ranked[file.power]) for one in answers], axis=0)
    near, far, copied = means[file.power].reshape(3, LAYERS, KV_HEADS, -1)
    weights = [layer_weights(losses, fractions, of) for losses, of in zip((near, copied), alone.T, strict=True)]
    assert (np.array(weights) > 0).all() and (weights[0] != weights[1]).all() and weights[0][0] != weights[0][1]
    follow, again = (of.repeat(KV_HEADS)[:, None] for of in weights)
    expected = [
        (kind.reshape(len(follow), -1) * follow + copied.reshape(len(again), -1) * again) / 2 for kind in (near, far)
    ]
    for kind, losses in ((file.whole.losses, expected[0]), (file.whole.followed, expected[1])):
        np.testing.assert_allclose(kind, losses, rtol=1e-4)
        assert (kind[:, -1] == 0).all()
        assert (kind[:, 0] > 0).all()
    assert (file.whole.losses != file.whole.followed).any()


def test_a_ranking_may_be_given_and_then_no_other_is_measured(directory, tmp_path):
    words = torch.randint(WORDS, (LENGTHS * CONTEXT + 1,), generator=torch.Generator().manual_seed(7)).tolist()
    text = tmp_path / "numbers.txt"
    text.write_text(" ".join(map(str, words)))
    arguments = ["calibrate", "--model", directory, "--text", text, "--context", CONTEXT, "--num-contexts", 1]
    written = []
    for power in (1, 2):
        path = tmp_path / f"by-{power}.json"
        result = CliRunner().invoke(app, list(map(str, [*arguments, "--ranking", power, "--out", path])))
        assert result.exit_code == 0, result.output
        written.append(read(path))
    assert [file.power for file in written] == [1, 2]
    assert (written[0].whole.losses != written[1].whole.losses).any()
    # Losses and ranking are those of another calibration, maps those of these contexts.
    old = written[0].model_copy(update={"query_maps": None, "losses": written[1].losses})
    old.write(tmp_path / "old.json")
    given = ["--losses-of", tmp_path / "old.json", "--out", tmp_path / "new.json", "--ranking", 2]
    result = CliRunner().invoke(app, list(map(str, [*arguments, *given])))
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "new.json") == old.model_copy(update={"query_maps": written[0].query_maps})


def test_layers_weigh_by_the_root_of_what_answers_mind_and_those_that_tell_nothing_by_what_the_others_do():
    at_15 = np.array([4.0, 1.0, 0.0, 2.0])  # what the layers' heads lose together where they are compared
    losses, fractions = at_15[:, None, None] * np.array([[[2.0, 1.0, 0.0], [2.0, 0.0, 0.0]]]), (0.1, COMPARED_AT, 1.0)
    alone = np.array([1.0, 4.0, 0.0, 0.0])  # roots of the ratios: 0.5, 2, none, 0
    expected = np.array([0.5, 2.0, 1.0, 0.5])
    weights = layer_weights(losses, fractions, alone)
    np.testing.assert_allclose(weights, expected * 7 / (expected * at_15).sum())
    np.testing.assert_allclose((weights * at_15).sum(), 7)
    with pytest.raises(ValueError, match="nothing to weigh"):
        layer_weights(losses, fractions, np.zeros(4))


def test_readings_count_the_same_however_much_is_lost_in_them():
    losses, fractions = np.array([[8.0, 4.0, 0.0], [2.0, 2.0, 0.0]]), (COMPARED_AT / 2, COMPARED_AT * 2, 1.0)
    np.testing.assert_allclose(shares(losses, fractions), losses / (10 - 4 / 3))  # a third of the way from 10 to 6
    np.testing.assert_allclose(shares(7 * losses, fractions), shares(losses, fractions))
    with pytest.raises(ValueError, match=r"no head loses anything with 0\.15 of its pages"):
        shares(0 * losses, fractions)


def test_a_layer_counts_by_how_much_the_answers_mind_what_it_loses():
    """By the root: what is minded a quarter as much counts half as much. What loses nothing has no part in it."""
    fractions, fall = (COMPARED_AT / 2, COMPARED_AT, 1.0), np.array([2.0, 1.0, 0.0])
    losses = np.array([[3 * fall, 5 * fall], [4 * fall, 4 * fall], [0 * fall, 0 * fall]])
    weights = layer_weights(losses, fractions, np.array([0.4, 0.1, 0.0]))
    np.testing.assert_allclose(weights[:2], [4 / 3, 2 / 3])
    assert (weights[:, None] * losses[..., 1]).sum() == pytest.approx(losses[..., 1].sum())


def test_answers_lose_nothing_by_a_layer_that_they_do_not_depend_on(directory):
    tokens = torch.randint(WORDS, (CONTEXT + 40,), generator=torch.Generator().manual_seed(5)).tolist()
    plain = LlamaForCausalLM.from_pretrained(directory)
    curves = LossCurves((1.0,), np.zeros((LAYERS * KV_HEADS, 1)), power=2)

    def lost():
        readings = [tokens[CONTEXT:], tokens[:30]]
        answers = Answers(EvaluationModel(plain), tokens[:CONTEXT], readings, EFFORTS["fast"], 16)
        return answers.lost_by_layer(0.3, curves)

    both = lost()
    assert both.shape == (LAYERS, 2) and (both > 0).all()
    with torch.no_grad():
        plain.model.layers[0].self_attn.o_proj.weight.zero_()
    first, second = lost()
    assert (first == 0).all() and (second > 0).all() and (second != both[1]).all()


def test_answers_lose_what_the_evaluation_finds(directory):
    """By the curves of a calibration, as `kvsculpt eval` compresses by them; nothing where everything is kept."""
    tokens = torch.randint(WORDS, (CONTEXT + 40,), generator=torch.Generator().manual_seed(6)).tolist()
    model, effort = EvaluationModel.load(directory, "cpu"), EFFORTS["fast"]
    curves = LossCurves((0.1, 0.4, 1.0), np.outer([1.0, 8.0, 2.0, 4.0], [1.0, 0.3, 0.0]), power=1)
    readings = [tokens[CONTEXT:], tokens[CONTEXT : CONTEXT + 11]]
    answers = Answers(model, tokens[:CONTEXT], readings, effort, 16)
    context = Context(model, tokens[:CONTEXT], 39, effort, 16, 64, 4)
    attempt = next(context.compress(surveyed("sculpt", calibration=curves), "adaptive", [0.4]))
    logits = [model.continue_from(cache, tokens[CONTEXT:-1], CONTEXT) for cache in (context.full_cache, attempt.cache)]
    expected = F.kl_div(logits[1].log_softmax(-1), logits[0].log_softmax(-1), log_target=True, reduction="none")
    expected = [float(expected.sum(-1).mean()), float(expected[:10].sum(-1).mean())]
    assert answers.lost(0.4, curves) == pytest.approx(expected, rel=1e-3)
    assert (answers.lost(1.0, curves) == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--effort", "much"], "got much, allowed: fast, balanced, thorough"),
        (["--context", "300"], "--context: got 300, allowed: at most a quarter of the model's 640 positions"),
        (["--second-reading", "1.5"], "Invalid value for '--second-reading'"),
        (["--ranking", "3"], "Invalid value for '--ranking'"),
        (["--text", "/absent"], "No such file"),
        (["--losses-of", "/absent"], "/absent cannot be read"),
        (["--model", "/absent"], "--model: /absent is neither"),
        (["--num-contexts", "100000"], "contexts of"),
        (["--device", "cuda"], "--device: got cuda, allowed: cpu"),
        (["--device", "tpv"], "--device: got tpv, allowed: cpu"),
        (["--out", "/absent/c.json"], "--out: /absent/c.json cannot be written"),
    ],
)
def test_bad_input_is_refused_by_name(directory, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["calibrate", "--model", str(directory), *arguments])
    assert result.exit_code
    assert message in " ".join(result.output.replace("│", " ").split())
