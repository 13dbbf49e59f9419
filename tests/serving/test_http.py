"""One server with compression, seen through the OpenAI client: what requests may say, and what they get."""

import json
import math
import re
import urllib.error

import pytest
from openai import BadRequestError

from kvsculpt_vllm.demo import document
from kvsculpt_vllm.engine.compat.patcher import has
from kvsculpt_vllm.plugin import installed_vllm

pytestmark = pytest.mark.engine


def compressed(get):
    return sum(get("/kvsculpt/stats")["requests"]["compressed"].values())


def test_a_chat_request_is_sculpted_and_answers_from_the_document(server, client, get):
    question = "What was the name of the merchant ship from which the bell was bought?"
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": f"{document()}\n\n{question}"}],
        temperature=0,
        max_tokens=40,
        stream=True,
    )
    answer, name, told = "", "", None
    for chunk in stream:
        name, told = chunk.id, getattr(chunk, "kv_transfer_params", None)
        answer += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert "Constance" in answer
    story = get(f"/kvsculpt/requests/{name}")
    record = story["compression"]
    assert story["outcome"] == "compressed"
    # The last chunk tells it, too, in vLLM 0.33.
    assert told is None if has("<0.33", installed_vllm()) else told["kv_compression"]["outcome"] == "compressed"
    assert (record["method"], record["budget"]) == ("sculpt", "adaptive")
    assert record["blocks_after"] <= 0.4 * record["blocks_before"]
    assert record["error_after"] < record["error_before"]
    kept = [entries for layer in record["budgets"] for entries in layer]
    assert sum(kept) / len(kept) == pytest.approx(record["entries_kept"])
    assert len(set(kept)) > 5 and len(record["budgets"]) == len(record["errors"]) == 30
    assert "kvsculpt: request" in server.log.read_text()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": document()}], "max_tokens": 8}),
        ("/v1/completions", {"prompt": document(), "max_tokens": 8}),
        ("/v1/responses", {"input": document(), "max_output_tokens": 8}),
    ],
)
def test_an_answer_tells_what_became_of_its_prompt_and_a_second_one_finds_it_sculpted(post, path, body):
    def ask(**settings):
        given = {"cache_salt": path.replace("/", "-"), "temperature": 0, "vllm_xargs": settings}
        answer = json.loads(post(path, body | given))
        usage = answer["usage"]
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        return answer["kv_transfer_params"]["kv_compression"], details.get("cached_tokens")

    exact, _ = ask(kv_compression="none")
    first, _ = ask()
    again, cached = ask()
    assert (exact["outcome"], exact["reason"]) == ("skipped", "off")
    assert (first["outcome"], first["tokens_found"]) == ("compressed", 0)
    assert 1024 < first["tokens_sculpted"] <= first["prompt_tokens"] - 64
    assert 0 < first["held_out_error"] < 0.1
    assert (again["outcome"], again["reason"], again["tokens_sculpted"]) == ("found", "cached", 0)
    assert again["tokens_found"] == first["tokens_sculpted"]
    assert again["entries_held"] == first["entries_held"] < 0.35 * first["tokens_sculpted"]
    assert again["held_out_error"] == first["held_out_error"]
    assert cached is None or cached >= again["tokens_found"]


def test_a_request_chooses_for_itself(client, get):
    def ask(**settings):
        completion = client.completions.create(
            model="tiny", prompt=document(), temperature=0, max_tokens=8, extra_body={"vllm_xargs": settings}
        )
        assert completion.choices[0].text.strip()
        return get(f"/kvsculpt/requests/{completion.id}")

    assert ask(kv_compression="none")["reason"] == "off"
    story = ask(kv_compression="select", kv_compression_keep_ratio=0.5, kv_compression_budget="uniform")
    record = story["compression"]
    assert (record["method"], record["budget"], record["keep_ratio"]) == ("select", "uniform", 0.5)
    kept = record["blocks_after"] - (record["blocks_before"] - record["span_tokens"] // 32)
    assert kept == -(-record["span_tokens"] // 32 // 2)
    assert record["span_tokens"] // 32 - kept == record["blocks_freed"]
    story = ask(kv_compression="select", kv_compression_keep_tokens=320, kv_compression_budget="uniform")
    record = story["compression"]
    assert record["keep_ratio"] == pytest.approx(320 / record["prompt_tokens"])
    assert 8 <= record["entries_kept"] / 32 <= 10


@pytest.mark.parametrize(
    ("length", "outcome"),
    [
        (1, "short"),
        (95, "short"),
        (96, None),  # exactly min_tokens, and a span of two blocks: 96 - 32 tokens of window
        (97, None),
        (127, None),
        (128, None),
        (129, None),
        (2557, None),  # with what is generated, exactly max_model_len
    ],
)
def test_prompts_around_min_tokens_block_borders_and_the_longest(client, get, length, outcome):
    settings = {"kv_compression": "select", "kv_compression_min_tokens": 96, "kv_compression_window": 32}
    settings |= {"kv_compression_budget": "uniform", "kv_compression_keep_ratio": 0.5}
    completion = client.completions.create(
        model="tiny",
        prompt=[(i * 37 + length) % 4000 + 100 for i in range(length)],
        max_tokens=3,
        temperature=0,
        extra_body={"vllm_xargs": settings, "ignore_eos": True},
    )
    assert completion.usage.completion_tokens == 3
    story = get(f"/kvsculpt/requests/{completion.id}")
    assert story["prompt_tokens"] == length
    if outcome:
        assert (story["outcome"], story["reason"]) == ("skipped", outcome)
    else:
        span = (length - 32) // 32
        assert story["outcome"] == "compressed"
        assert story["compression"]["span_tokens"] == span * 32
        assert story["compression"]["blocks_after"] == -(-length // 32) - span + -(-span // 2)


def test_several_answers_logprobs_and_forced_lengths_work_on_compressed_prompts(client, get):
    settings = {"kv_compression": "select", "kv_compression_min_tokens": 96, "kv_compression_window": 32}
    settings |= {"kv_compression_budget": "uniform"}
    before = compressed(get)
    completion = client.completions.create(
        model="tiny",
        prompt=list(range(300, 700)),
        n=3,
        temperature=1.0,
        seed=1,
        logprobs=2,
        max_tokens=6,
        extra_body={"vllm_xargs": settings, "min_tokens": 6, "prompt_logprobs": 1},
    )
    assert len(completion.choices) == 3
    for choice in completion.choices:
        assert len(choice.logprobs.token_logprobs) == 6
        assert all(math.isfinite(p) and p <= 0 for p in choice.logprobs.token_logprobs)
    # Answers to one prompt share its blocks: the last one to be alone with them can be compressed, if any.
    assert compressed(get) >= before
    assert get("/kvsculpt/stats")["requests"]["failed"] == {}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 3}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 3, "stream": True}),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": word}] for word in ("a", "b")]}),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "use_beam_search": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}]}),
        ("/inference/v1/generate", {"token_ids": [300, 301], "sampling_params": {"n": 2, "max_tokens": 3}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(sorted(value)),
)
def test_the_id_of_every_answer_is_found(post, get, path, body):
    answer = post(path, {"max_tokens": 3} | body)
    name = re.search(r'"(?:id|request_id)": ?"([^"]+)"', answer)[1]
    story = get(f"/kvsculpt/requests/{name}")
    assert name in story["request_id"]
    assert story["outcome"] == "skipped"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "a"}]]}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 2, "stream": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses/render", {"input": "a"}),
        ("/inference/v1/generate", {"token_ids": [300], "stream": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "stream" if value.get("stream") else "whole",
)
def test_a_boolean_is_refused_as_a_number_and_passes_in_what_is_not_ours(post, path, body):
    def ask(**xargs):
        given = {"sampling_params": {"max_tokens": 2, "extra_args": xargs}} if "token_ids" in body else {}
        return post(path, {"max_tokens": 2, "vllm_xargs": xargs} | body | given)

    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(kv_compression_keep_ratio=True)
    assert refused.value.code == 400
    assert "kv_compression_keep_ratio: got True, allowed: a number > 0 and <= 1" in refused.value.read().decode()
    assert ask(of_others=True, kv_compression_keep_ratio=0.5)


HUGE = 10**400

BAD = [
    ({"kv_compression": "sculp"}, ["kv_compression", "sculp", "select_fit"]),
    ({"kv_compression": 3}, ["kv_compression", "3", "sculpt"]),
    ({"kv_compression": ["sculpt"]}, ["kv_compression"]),
    ({"kv_compression": ""}, ["kv_compression", "sculpt"]),
    ({"kv_compression_keep_ratio": 1.5}, ["kv_compression_keep_ratio", "1.5", "<= 1"]),
    ({"kv_compression_keep_ratio": 0}, ["kv_compression_keep_ratio", "> 0"]),
    ({"kv_compression_keep_ratio": -0.3}, ["kv_compression_keep_ratio", "-0.3"]),
    ({"kv_compression_keep_tokens": -1}, ["kv_compression_keep_tokens", "-1", ">= 0"]),
    ({"kv_compression_keep_ratio": "half"}, ["kv_compression_keep_ratio", "half"]),
    ({"kv_compression_keep_ratio": 1e300}, ["kv_compression_keep_ratio", "<= 1"]),
    ({"kv_compression_keep_ratio": "nan"}, ["kv_compression_keep_ratio", "nan"]),
    ({"kv_compression_max_error": "inf"}, ["kv_compression_max_error", "inf"]),
    ({"kv_compression_min_tokens": 0}, ["kv_compression_min_tokens", ">= 1"]),
    ({"kv_compression_min_tokens": 12.5}, ["kv_compression_min_tokens", "whole number"]),
    ({"kv_compression_window": -1}, ["kv_compression_window"]),
    ({"kv_compression_sink": 32}, ["kv_compression_sink", "below the block size 32"]),
    ({"kv_compression_budget": "some"}, ["kv_compression_budget", "uniform, adaptive"]),
    ({"kv_compression_effort": "most"}, ["kv_compression_effort", "thorough"]),
    ({"kv_compression_on_failure": "stop"}, ["kv_compression_on_failure", "exact, select"]),
    ({"kv_compression_keepratio": 0.5}, ["kv_compression_keepratio", "kv_compression_keep_ratio"]),
    ({"KV-Compression": "sculpt"}, ["KV-Compression", "kv_compression"]),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("settings", "named"), BAD, ids=[str(settings)[:60] for settings, _ in BAD])
def test_a_bad_setting_is_refused_with_400_that_names_it(client, settings, named, stream):
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hello"}],
            stream=stream,
            extra_body={"vllm_xargs": settings},
        )
    for word in named:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", '{"prompt": "a", "vllm_xargs": {"kv_compression_keep_ratio": NaN}}', {400, 422}),
        ("/v1/completions", '{"prompt": "a", "vllm_xargs": {"kv_compression_keep_ratio": -Infinity}}', {400, 422}),
        ("/v1/completions", f'{{"prompt": "a", "vllm_xargs": {{"kv_compression_window": {HUGE}}}}}', {400, 422}),
        ("/v1/completions", '{"prompt": "a", "vllm_xargs": {"kv_compression_keep_ratio": null}}', {400, 422}),
        ("/v1/completions", '{"prompt": "a", "vllm_xargs": {"kv_compression": {"method": "sculpt"}}}', {400, 422}),
        ("/v1/completions", '{"prompt": "a", "vllm_xargs": ["kv_compression"]}', {400, 422}),
        ("/v1/completions", '{"prompt": "a", "vllm_xargs": {3: "kv_compression"}}', {400, 422}),
        (
            "/v1/completions",
            '{"prompt": "a", "use_beam_search": true, "n": 2, "vllm_xargs": {"kv_compression": "sculpt"}}',
            {400},
        ),
        ("/v1/embeddings", '{"input": "a", "vllm_xargs": {"kv_compression": "sculpt"}}', {400, 404}),
        ("/v1/completions", '{"prompt": [], "vllm_xargs": {"kv_compression": "sculpt"}}', {400}),
    ],
)
def test_what_no_client_library_would_send_is_refused_too(post, get, path, body, status):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(path, body.replace("{", '{"model": "tiny", ', 1))
    assert refused.value.code in status, refused.value.read()
    assert refused.value.code == 404 or json.loads(refused.value.read())["error"]
    assert get("/kvsculpt/stats")["requests"]["failed"] == {}
