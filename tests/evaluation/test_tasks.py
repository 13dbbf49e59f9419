"""Tasks hide what they ask for, and answers are greedy whatever was drafted."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvsculpt_vllm.evaluation.attention import RaggedCache
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.evaluation.tasks import TASKS, samples, score


class Letters:
    """One token a character; a conversation is its content between marks."""

    chat_template = "there"

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})

    def apply_chat_template(self, conversation, **_):
        return f"<user>{conversation[0]['content']}</user><assistant>"


TEXT = " ".join(f"This is sentence number {i}, and it says little." for i in range(200))


@pytest.mark.parametrize("name", TASKS)
def test_what_is_asked_for_is_in_the_context_and_the_question_is_not(name):
    two = samples(name, TEXT, Letters(), 2000, 2, seed=3)
    assert two == samples(name, TEXT, Letters(), 2000, 2, seed=3) != samples(name, TEXT, Letters(), 2000, 2, seed=4)
    for sample in two:
        context, question = ("".join(map(chr, tokens)) for tokens in (sample.context, sample.question))
        assert 1900 < len(context) <= 2000
        assert all(reference in context and reference not in question for reference in sample.references)
        assert "?" in question or "Find" in question
        assert question.partition("</user><assistant>")[2] and "</user>" not in context
    first, second = ({"".join(map(chr, sample.context))[1000:1200]} for sample in two)
    assert first != second  # other parts of the text


def test_a_text_that_cannot_fill_the_context_is_refused():
    with pytest.raises(ValueError, match="--context: 20000 tokens"):
        samples("niah", TEXT, Letters(), 20000, 1, seed=0)


def test_a_chain_of_variables_can_be_followed():
    task = TASKS["tracking"](random.Random(0))
    values = {}
    for fact in task.facts:
        name, value = fact.removeprefix("VAR ").removesuffix(".").split(" = ")
        values[name] = values.get(value.removeprefix("VAR "), value)
    assert list(values) == task.references and set(values.values()) == {task.facts[0].split(" = ")[1][:-1]}
    assert task.facts[0].split(" = ")[1][:-1] in task.question


def test_the_score_counts_the_references_that_are_there():
    assert score("It is ABC and 12.", ["abc", "12", "xyz", "0"]) == 0.5


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
