"""Answers are greedy whatever was drafted, and questions of one context do not know of each other."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvsculpt_vllm.evaluation.attention import RaggedCache
from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.methods import METHODS
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.evaluation.retrieval import Found, Retrieval
from kvsculpt_vllm.evaluation.tasks.question import LEAKAGE, SCORE, Holds, Question
from kvsculpt_vllm.evaluation.tasks.sample import Sample
from kvsculpt_vllm.sculpt.effort import Effort

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT, LIMIT = 120, 6
EFFORT = Effort(positions=80, pilot_positions=60, fit_positions=80, key_steps=2)


class Numbers:
    """A token reads as its number."""

    def decode(self, tokens):
        return " ".join(map(str, tokens))


@torch.no_grad()
def test_an_answer_is_greedy_whatever_was_drafted():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        eos_token_id=7,
    )
    network = LlamaForCausalLM(config).eval()
    context, question = torch.randint(8, 61, (40,)).tolist(), [9, 10, 11]
    plain = network.generate(torch.tensor([context + question]), max_new_tokens=20, do_sample=False)[0, 43:].tolist()
    plain = plain[: plain.index(7)] if 7 in plain else plain

    model = EvaluationModel(network, storage=torch.float32)
    recording = model.record(context, torch.tensor([0]))
    cache = RaggedCache(list(recording.keys), list(recording.values), torch.float32)
    for draft in ([], plain, [*plain[:5], 8, *plain[6:]], [8] * 30, [*plain, 9, 9]):
        assert model.answer(cache, question, 40, 20, draft) == plain
    assert model.answer(cache, question, 40, 4, plain) == plain[:4]


@torch.no_grad()
def test_no_token_of_an_answer_is_computed_twice_and_drafts_save_passes(tiny_llama, monkeypatch):
    model = EvaluationModel(tiny_llama(2, 4, 2, 97, positions=512), storage=torch.float32)
    recording = model.record([5] * 40, torch.tensor([0]))
    cache = RaggedCache(list(recording.keys), list(recording.values), torch.float32)
    passes, forward = [], model.continue_from
    monkeypatch.setattr(
        model,
        "continue_from",
        lambda cache, tokens, first: passes.append((first, len(tokens))) or forward(cache, tokens, first),
    )
    answer = model.answer(cache, [9, 10, 11], 40, 8)
    assert passes == [(40, 3), *((42 + i, 1) for i in range(1, 8))]
    passes.clear()
    assert model.answer(cache, [9, 10, 11], 40, 8, answer) == answer
    assert passes == [(40, 3 + 8)]
    passes.clear()
    wrong = [*answer[:2], answer[2] + 1, *answer[3:]]
    assert model.answer(cache, [9, 10, 11], 40, 8, wrong) == answer
    assert passes == [(40, 3 + 8), (45, 1), (46, 1 + 4)]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return EvaluationModel(tiny_llama(2, 4, 2, 97, positions=512))


def retrieval(model, questions):
    tokens = torch.randint(97, (CONTEXT,), generator=torch.Generator().manual_seed(5)).tolist()
    asked = [[3, 4, 5 + int(question.asked)] for question in questions]
    sample = Sample(tokens, questions, asked, [[] for _ in questions])
    context = Context(model, sample.context, sample.following, EFFORT, 8, 16, 4)
    return Retrieval(context, sample, Numbers())


def question(name, check=Holds(("no",)), measures=SCORE):  # noqa: B008
    return Question(name, "", check, LIMIT, measures)


def test_each_question_is_answered_as_if_it_were_the_only_one(model):
    names = "0", "1", "2"
    (together,) = retrieval(model, [question(name) for name in names]).measure(METHODS["select"], "uniform", [0.3])
    alone = [
        next(retrieval(model, [question(name)]).measure(METHODS["select"], "uniform", [0.3])).answers for name in names
    ]
    assert [[answer] for answer in together.answers] == alone
    assert len(set(together.answers)) == len(names)
    assert together.answers != together.answers_full


def test_what_is_kept_whole_answers_as_the_full_cache(model):
    (found,) = retrieval(model, [question("0"), question("1")]).measure(METHODS["select"], "uniform", [1.0])
    assert found.answers == found.answers_full and found.kept_fraction == 1


def found(scores, scores_full, measures=(SCORE, SCORE, LEAKAGE)):
    answers = ["one", "two", "three"]
    return Found(list(measures), scores, scores_full, 0.5, 2.0, answers, answers)


def test_a_row_has_each_measure_s_mean_and_that_of_samples_and_questions():
    row = Found.summary([found([1, 0, 1], [1, 1, 0]), found([0.5, 0, 0], [1, 0, 0])])
    assert (row["score"], row["score_full"], row["leakage"], row["leakage_full"]) == (0.375, 0.75, 0.5, 0)
    assert row["score_per_sample"] == [0.5, 0.25] and row["score_full_per_sample"] == [1, 0.5]
    assert row["score_per_question"] == [0.75, 0] and row["leakage_per_sample"] == [1, 0]
    assert row["answers"] == [["one", "two", "three"]] * 2 and row["seconds"] == 2


def test_a_task_without_a_secret_has_no_leakage():
    row = Found.summary([found([1, 0, 1], [1, 1, 0], measures=(SCORE,) * 3)])
    assert not any("leakage" in name for name in row)


def test_a_result_survives_its_file():
    one = found([1, 0, 1], [1, 1, 0])
    assert Found.from_json(one.to_json()) == one
