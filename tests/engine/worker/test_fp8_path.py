"""A cache of FP8 on the path of a GPU, through Triton's interpreter: what is stored, packed and answered."""

import pydoc_data.topics

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from jobs import on, request
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.sculpt.storage import Form
from kvsculpt_vllm.sculpt.turned import hadamard
from random_models import SMALL, save

LENGTH, ANSWER = 200, 7
CHAIN = on(min_tokens=64, window=32, max_stall_ms=60_000, segment=64, decode=64)


@pytest.fixture(scope="module")
def biased_path(model_path, tmp_path_factory):
    """A model whose keys have far more in common than they differ, as some of Qwen2's layers."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL, max_position_embeddings=512, use_sliding_window=False))
    for layer in model.model.layers:
        bias = torch.zeros(3, 32)
        bias[:, [13, 15, 31]] = torch.tensor([-60.0, 150.0, 90.0])  # of the slowest pairs of channels
        layer.self_attn.k_proj.bias.data = bias.flatten()
    return save(model, tmp_path_factory.mktemp("biased"), model_path)


class EveryEntryInFP8:
    """Causal attention in which each key and value is what FP8 makes of it, as they come."""

    def __init__(self, centres, turned=True, rounded=True):
        self._centres, self._turn, self._rounded = centres.view(2, 3, 32), hadamard(32) if turned else None, rounded

    def attend(self, layer, query, key, value, softmax):
        scales = torch.ones(len(key))
        if self._rounded:
            key = Form(scales, self._turn, self._centres[layer]).rounded(key)
            value = Form(scales, self._turn).rounded(value)
        return torch.nn.functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=softmax.scale, enable_gqa=True
        )[0]


def prompt_of(model_path):
    """The tokens that `engine_job.py` takes for a prompt that begins at 0."""
    topics = pydoc_data.topics.topics
    text = " ".join(topics[name] for name in sorted(topics))[:60000]
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    return [token % SMALL["vocab_size"] for token in tokenizer.encode(text).ids[:LENGTH]]


def lost(model, cache, tokens):
    """By how much each token of the answer is less likely, in logits, than the likeliest one."""
    with torch.no_grad():
        logits = model.continue_from(cache, tokens[:-1], 0)[LENGTH - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens[LENGTH:])[:, None])[:, 0]
    return float((logits.max(-1).values - chosen).max())


@pytest.mark.engine
def test_a_cache_in_fp8_answers_as_a_model_whose_entries_are_rounded_packed_or_not(run_engine, biased_path):
    engine = {
        "model": str(biased_path),
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 26,
        "kv_cache_dtype": "fp8",
        "additional_config": CHAIN,
    }
    batches = [[request(0, LENGTH, ANSWER)], [request(0, LENGTH, ANSWER, kv_compression="none")]]
    ours = run_engine(
        engine=engine, batches=batches, gpu_path=True, identity=True, poison=True, v2=True, self_test=True
    )
    assert [told["segments"] for batch in ours["told"] for told in batch] == [2, 0]
    # With every entry kept a chain holds bit by bit what is in the exact cache.
    assert ours["tokens"][0] == ours["tokens"][1]
    assert ours["self_tested"]["failures"] == []
    assert ours["self_tested"]["subject"]["cache"] == "float8_e4m3fn"

    model = EvaluationModel(AutoModelForCausalLM.from_pretrained(biased_path, dtype=torch.float32))
    tokens = prompt_of(biased_path) + ours["tokens"][0][0]
    centres = model.key_centres
    assert float(centres.abs().max()) > 100
    assert lost(model, EveryEntryInFP8(centres), tokens) < 0.05
    # These would have given another answer.
    for kwargs in ({"centres": 0 * centres}, {"turned": False}, {"rounded": False}):
        assert lost(model, EveryEntryInFP8(**{"centres": centres, **kwargs}), tokens) > 0.3
