"""How long a context may be in the memory there is: at start-up, of a request, and of an answer."""

from types import SimpleNamespace

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared import spans
from kvsculpt_vllm.engine.shared.capacity import blocks_of_engine, most_tokens, server_settings
from kvsculpt_vllm.engine.startup.hooks import _as_compressed
from kvsculpt_vllm.engine.startup.request_checks import check_length

BLOCK, LONGEST = 32, 8192


def engine(blocks=126, caching=True, engines=1, kinds=None, layers=30, **settings):
    """What of vLLM's configuration tells how much memory there is; the null block is one of the blocks."""
    return SimpleNamespace(
        additional_config={"kv_compression": {"method": "sculpt", "segment": 1024, **settings}},
        cache_config=SimpleNamespace(
            block_size=BLOCK, cache_dtype="auto", enable_prefix_caching=caching, num_gpu_blocks=blocks
        ),
        model_config=SimpleNamespace(
            max_model_len=LONGEST,
            get_sliding_window=lambda: None if kinds is None else 512,
            hf_text_config=SimpleNamespace(layer_types=kinds),
            dtype=torch.bfloat16,
            get_num_layers=lambda parallel: layers,
            get_num_kv_heads=lambda parallel: 3,
            get_num_attention_heads=lambda parallel: 9,
            get_head_size=lambda: 64,
        ),
        parallel_config=SimpleNamespace(data_parallel_size=engines),
    )


def needed(vllm_config) -> int:
    """Blocks that vLLM's start-up check asks for, where a block takes a byte."""
    return _as_compressed(lambda *_: LONGEST // BLOCK)(vllm_config, [])


def test_the_start_up_check_asks_for_what_the_longest_context_takes_compressed():
    config = CompressionConfig(method="sculpt", segment=1024)
    assert needed(engine()) == spans.blocks_up_to(config, LONGEST, BLOCK) < 125
    # A larger segment takes more beside the packed ones.
    assert needed(engine()) < needed(engine(segment=2048)) < LONGEST // BLOCK
    # What is shorter than --kv-compression-min-tokens stays exact.
    assert needed(engine(min_tokens=5000)) == -(-5000 // BLOCK)


def test_segments_are_long_by_default_where_the_longest_context_fits_into_the_memory_with_them():
    short, long = (
        spans.blocks_up_to(CompressionConfig(method="sculpt", segment=segment), LONGEST, BLOCK)
        for segment in (2048, 4096)
    )
    small = engine(segment="auto")
    assert needed(small) == short < long < LONGEST // BLOCK
    assert [server_settings(small, blocks).segment for blocks in (short, long - 1, long, None)] == [
        2048,
        2048,
        4096,
        4096,
    ]
    # Nothing is longer than the memory without prefix caching, so that it has room.
    assert server_settings(engine(segment="auto", caching=False), short).segment == 4096
    assert server_settings(engine(segment="auto", decode=3000), short).segment == 4096  # as answers are
    assert needed(engine(segment="auto", decode=3000)) >= long
    assert server_settings(engine(segment="auto", layers=60), 1000).segment == 2048  # a larger model
    assert server_settings(engine(segment=4096), short).segment == 4096
    # The front end allows what the engine has room for.
    tokens = {"prompt_token_ids": list(range(LONGEST - 1))}
    check_length(engine(segment="auto", blocks=short + 1), tokens, None)
    with pytest.raises(VLLMValidationError, match="at most"):
        check_length(engine(segment=4096, blocks=short + 1), tokens, None)


@pytest.mark.parametrize(
    "settings",
    [{"decode": 0}, {"caching": False}, {"keep_ratio": 1.0}, {"method": "none"}],
    ids=["answers stay exact", "no chain is found again", "nothing to free", "off"],
)
def test_it_asks_for_all_of_it_where_not_all_is_compressed(settings):
    if settings.get("method") == "none":
        config = engine()
        config.additional_config = {}
    else:
        config = engine(**settings)
    assert needed(config) == LONGEST // BLOCK


def test_with_windows_nothing_is_longer_than_the_memory():
    mixed = ["sliding_attention", "full_attention"]
    assert needed(engine(kinds=mixed)) == LONGEST // BLOCK > needed(engine(kinds=["full_attention"]))
    check_length(engine(blocks=300, kinds=mixed), prompt(7900), params())


def params(prompt_logprobs=None, **extra_args):
    return SimpleNamespace(prompt_logprobs=prompt_logprobs, extra_args=extra_args or None)


def prompt(tokens):
    return {"prompt_token_ids": list(range(tokens))}


def test_a_prompt_that_is_compressed_may_be_longer_than_the_memory():
    check_length(engine(), prompt(7900), params())
    with pytest.raises(VLLMValidationError, match=r"7900 tokens, and at most \d+ fit"):
        check_length(engine(blocks=60), prompt(7900), params())


@pytest.mark.parametrize(
    ("of", "why"),
    [
        (params(kv_compression="none"), "with kv_compression none"),
        (params(prompt_logprobs=1), "with prompt_logprobs"),
    ],
)
def test_one_that_stays_exact_may_not_and_the_error_says_how_long_it_may_be(of, why):
    most = 125 * BLOCK - 1  # and a token of the answer
    check_length(engine(), prompt(most), of)
    with pytest.raises(VLLMValidationError, match=f"{most + 1} tokens, and at most {most} .* {why}"):
        check_length(engine(), prompt(most + 1), of)


def test_a_few_tokens_over_and_over_are_not_compressed_and_may_not_be_longer_either():
    check_length(engine(), {"prompt_token_ids": [1, 2] * 1900}, params())
    with pytest.raises(VLLMValidationError, match="over and over"):
        check_length(engine(), {"prompt_token_ids": [1, 2] * 2100}, params())


def test_nothing_is_refused_where_every_context_fits_or_the_memory_is_not_known():
    check_length(engine(blocks=300), prompt(LONGEST), params(kv_compression="none"))
    check_length(engine(blocks=None), prompt(LONGEST), params(kv_compression="none"))
    check_length(engine(), {"prompt_embeds": "no tokens"}, params(kv_compression="none"))
    check_length(engine(), "not tokenised yet", params(kv_compression="none"))


def test_each_of_several_engines_has_its_part_of_the_memory():
    assert blocks_of_engine(engine(blocks=252, engines=2)) == 125


@pytest.mark.parametrize("settings", [{}, {"segment": 256}, {"keep_ratio": 0.7}, {"segment": 512, "decode": 100}])
def test_what_start_up_lets_through_is_what_requests_may_come_to(settings):
    config = CompressionConfig(method="sculpt", **{"segment": 1024, **settings})
    blocks = needed(engine(**settings))
    assert most_tokens(engine(**settings), config, blocks) == LONGEST
    assert blocks == LONGEST // BLOCK or most_tokens(engine(**settings), config, blocks - 1) < LONGEST


def test_what_a_context_takes_is_reckoned_alike_for_every_vllm():
    vllm_config, told = engine(), []
    reckon = _as_compressed(lambda *args: told.append(args) or LONGEST // BLOCK)
    assert reckon(vllm_config, []) == reckon("builder", vllm_config, []) == needed(vllm_config) < LONGEST // BLOCK
    assert told == [(vllm_config, []), ("builder", vllm_config, [])]  # 0.32, 0.33


def test_answers_end_where_the_memory_does():
    vllm_config = engine(blocks=126)
    assert most_tokens(vllm_config, CompressionConfig(), 125) == 125 * BLOCK
    assert most_tokens(vllm_config, CompressionConfig(), 300) == LONGEST
    config = CompressionConfig(method="sculpt", segment=1024)
    assert most_tokens(vllm_config, config, 125) == LONGEST
    assert 60 * BLOCK < most_tokens(vllm_config, config, 60) < LONGEST
