"""A model whose layers see windows, but for every third: the engine on it, compared with stock vLLM's greedy tokens."""

import pytest
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from jobs import check_chains, on, request
from random_models import save

pytestmark = pytest.mark.engine

WINDOW = 100
CHAINS = on(max_stall_ms=60_000, segment=256, decode=128, min_tokens=128)
ENGINE = {"dtype": "float32", "max_num_batched_tokens": 512}


@pytest.fixture(scope="module")
def windowed_path(tmp_path_factory, model_path):
    """A Gemma 3 of six layers with random weights that make what is attended to decide, and a real tokenizer."""
    torch.manual_seed(0)
    kinds = 2 * ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(model_path)),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=len(kinds),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=WINDOW,
        layer_types=kinds,
        max_position_embeddings=4096,
        initializer_range=0.15,
    )
    return save(Gemma3ForCausalLM(config), tmp_path_factory.mktemp("windowed"), model_path)


def test_chains_that_are_found_adopted_or_grow_give_the_tokens_of_stock_vllm(run_engine, windowed_path):
    """What `test_engine.py` asks of a model without windows: questions about one document, turns, twins, long answers.

    A prompt that begins with segments goes on from the windows that were there where the last of them ends.
    """
    batches = [
        [request(0, 1200)],
        [request(0, 1250), request(0, 1240, kv_compression="none")],  # another question, and one that wants it exact
        [request(0, 1280)],  # a later turn
        [request(0, 660)],  # the beginning of the document: the first two segments are found
        [request(3000, 880, 40), request(3000, 900, 30), request(3000, 900, 30)],  # at once
        [request(7000, 100, 350)],  # a long answer to a short prompt
        [request(7000, 250, 150)],
    ]
    engine = {**ENGINE, "model": str(windowed_path), "enable_prefix_caching": True}
    stock = run_engine(engine=engine, batches=[[{**r, "extra_args": None} for r in batch] for batch in batches])
    ours = run_engine(engine={**engine, "additional_config": CHAINS}, batches=batches, identity=True)
    assert len({tuple(tokens) for batch in stock["tokens"] for tokens in batch}) > 5  # else nothing would be shown
    assert ours["tokens"] == stock["tokens"]
    check_chains(ours)


@pytest.mark.parametrize("v2", [False, True], ids=["V1, two ranks", "V2"])
def test_every_entry_in_shuffled_packed_pages_gives_the_tokens_of_stock_vllm(run_engine, windowed_path, v2):
    """In chunks smaller than a segment, and what the blocks held before is spoilt: windows take some of them. With
    tensor parallelism each rank has one of the two heads.
    """
    batches = [[request(0, 600, 5), request(5000, 64, 5)]] if v2 else [[request(0, 1200), request(2000, 900)]]
    engine = {**ENGINE, "model": str(windowed_path), "enable_prefix_caching": False, "max_num_batched_tokens": 200}
    stock = run_engine(engine=engine, batches=batches)
    ours = run_engine(
        engine={**engine, "additional_config": CHAINS, "tensor_parallel_size": 1 if v2 else 2},
        batches=batches,
        identity=True,
        poison=True,
        **{"v2": True} if v2 else {},
    )
    assert ours["tokens"] == stock["tokens"]
    assert [told and told["segments"] for told in ours["told"][0]] == ([2, 0] if v2 else [4, 3])
    assert ours["free"][0][-1] == ours["free_at_start"]
