"""What a second reading asks, against transformers' own attention; maps are learned as a ridge regression by numpy."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from kvsculpt_vllm.evaluation import second_reading
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.evaluation.second_reading import RIDGE, UNSURE, Foreteller, SecondReading
from kvsculpt_vllm.sculpt.foretold import SHARPLY
from kvsculpt_vllm.sculpt.selection import teach

LAYERS, HEADS, KV_HEADS, WORDS = 2, 4, 2, 50
GROUP = HEADS // KV_HEADS
CONTEXT, SPAN, SINKS, PREFIX = 150, 64, 4, 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_llama):
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(LAYERS, HEADS, KV_HEADS, WORDS, positions=640).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(directory):
    """The model as transformers has it, with the attention that tells its weights."""
    return LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager")


@pytest.fixture(scope="module")
def contexts():
    return torch.randint(WORDS, (3, CONTEXT), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def readings(directory, contexts):
    """Each context, read twice."""
    model = EvaluationModel(LlamaForCausalLM.from_pretrained(directory), storage=torch.float32)
    return [SecondReading(model, tokens, PREFIX) for tokens in contexts]


def twice(tokens):
    return torch.tensor([tokens + tokens[PREFIX:]])


@torch.no_grad()
def weights_of(plain, tokens):
    """Transformers' attention weights (L, heads, P, CONTEXT) from the second reading to the first, and its values."""
    told = plain(twice(tokens), output_attentions=True, use_cache=True)
    weights = torch.stack([layer[0, :, CONTEXT:, :CONTEXT] for layer in told.attentions])
    values = [layer.values[0, :, :CONTEXT] for layer in told.past_key_values.layers]
    return weights, torch.stack(values)


def test_the_second_reading_asks_the_first_ones_entries_alone(plain, contexts, readings):
    problems = readings[0].problems(CONTEXT, SPAN, SINKS)
    found = teach(problems.take(slice(None)), 1 << 20)
    weights, values = weights_of(plain, contexts[0])
    weights = weights / weights.sum(-1, keepdim=True)
    expected = weights @ values.repeat_interleave(GROUP, 1)  # (L, heads, P, D)
    by_head = found.out.unflatten(1, (CONTEXT - PREFIX, GROUP)).transpose(1, 2).reshape(expected.shape)
    torch.testing.assert_close(by_head, expected, rtol=0, atol=1e-4)


def test_queries_are_those_that_the_model_has_before_it_turns_them(plain, contexts, readings):
    asked = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, given, out: asked.append(out[0]))
        for layer in plain.model.layers
    ]
    with torch.no_grad():
        plain(twice(contexts[0]))
    for hook in hooks:
        hook.remove()
    expected = torch.stack(asked).unflatten(-1, (HEADS, -1))  # (L, tokens, heads, D)
    first, second = readings[0].queries()
    torch.testing.assert_close(first, expected[:, PREFIX:CONTEXT], rtol=0, atol=1e-4)
    torch.testing.assert_close(second, expected[:, CONTEXT:], rtol=0, atol=1e-4)
    assert (first - second).abs().max() > 0.01  # what is before a token tells the readings apart


def test_maps_are_learned_of_the_heads_that_copy(plain, contexts, readings, monkeypatch):
    monkeypatch.setattr(second_reading, "WANTED", 0.5)
    shares = []
    for tokens in contexts:
        weights, _ = weights_of(plain, tokens)
        given = weights[..., SINKS:SPAN].unflatten(1, (KV_HEADS, GROUP)).pow(SHARPLY).sum((2, 3)) ** (1 / SHARPLY)
        shares.append((given >= 0.5).double().mean(-1).flatten())
    shares = torch.stack(shares).mean(0)
    least = float((shares.min() + shares.max()) / 2)
    monkeypatch.setattr(second_reading, "WANTING", least)
    foreteller = Foreteller()
    with pytest.raises(ValueError, match="no context to learn from"):
        foreteller.maps()
    for reading in readings:
        foreteller.add(reading, SPAN, SINKS)
    stored = foreteller.maps()
    assert stored.heads == tuple(divmod(b, KV_HEADS) for b in range(LAYERS * KV_HEADS) if shares[b] >= least)
    assert 0 < len(stored.heads) < LAYERS * KV_HEADS and stored.group == GROUP

    maps = stored.part(range(LAYERS), range(KV_HEADS), 0, 1)
    for number, own in zip(maps.heads, maps.maps, strict=True):
        for query_head, found in enumerate(own):
            layer, head = number // KV_HEADS, number % KV_HEADS * GROUP + query_head
            known, asked = (
                np.concatenate([reading.queries()[which][layer, UNSURE:, head].double() for reading in readings])
                for which in (0, 1)
            )
            known = np.concatenate([known, np.ones_like(known[:, :1])], axis=1)
            ridge = RIDGE * np.mean(np.sum(known**2, axis=0))
            rows = np.concatenate([known, np.sqrt(ridge) * np.eye(known.shape[1])])  # ridge as rows of least squares
            wanted, *_ = np.linalg.lstsq(rows, np.concatenate([asked, np.zeros((known.shape[1], asked.shape[1]))]))
            steps = np.abs(wanted - np.eye(*wanted.shape)).max(axis=0) / 127  # stored in 8 bits
            assert (np.abs(found.numpy() - wanted) <= 0.6 * steps).all()


def test_a_model_whose_heads_do_not_copy_has_no_maps(readings, monkeypatch):
    monkeypatch.setattr(second_reading, "WANTED", 2.0)  # more than all queries give together
    foreteller = Foreteller()
    foreteller.add(readings[0], SPAN, SINKS)
    assert foreteller.maps() is None
