"""One server with compression, seen through the OpenAI client."""

import json
import urllib.request

import pytest
from openai import BadRequestError, OpenAI

from kvsculpt_vllm.demo import document
from kvsculpt_vllm.serving.launch import serve

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(model_path):
    with serve(
        model_path,
        *("--max-model-len", "4096", "--kv-cache-memory-bytes", str(1 << 28), "--enforce-eager"),
        *("--kv-compression", "sculpt", "--kv-compression-effort", "fast", "--served-model-name", "tiny"),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0)


def report(server):
    with urllib.request.urlopen(f"{server.address}/kv_compression", timeout=30) as response:
        return json.load(response)


def test_a_chat_request_is_sculpted_and_answers_from_the_document(server, client):
    question = "What was the name of the merchant ship from which the bell was bought?"
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": f"{document()}\n\n{question}"}],
        temperature=0,
        max_tokens=40,
        stream=True,
    )
    answer = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert "Constance" in answer
    record = report(server)["requests"][-1]
    assert (record["method"], record["budget"]) == ("sculpt", "adaptive")
    assert record["blocks_after"] <= 0.4 * record["blocks_before"]
    assert record["error_after"] < record["error_before"]
    assert "kvsculpt: request" in server.log.read_text()


def test_a_request_chooses_for_itself(server, client):
    before = report(server)["totals"]["compressions"]
    settings = [
        {"kv_compression": "none"},
        {"kv_compression": "select", "kv_compression_keep_ratio": 0.5, "kv_compression_budget": "uniform"},
    ]
    for chosen in settings:
        completion = client.completions.create(
            model="tiny", prompt=document(), temperature=0, max_tokens=8, extra_body={"vllm_xargs": chosen}
        )
        assert completion.choices[0].text.strip()
    after = report(server)
    assert after["totals"]["compressions"] == before + 1
    record = after["requests"][-1]
    assert (record["method"], record["budget"]) == ("select", "uniform")
    kept = record["blocks_after"] - (record["blocks_before"] - record["span_tokens"] // 32)
    assert kept == -(-record["span_tokens"] // 32 // 2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kv_compression": "sculp"}, ["kv_compression", "sculp", "select_fit"]),
        ({"kv_compression_keep_ratio": 1.5}, ["kv_compression_keep_ratio", "1.5", "<= 1"]),
        ({"kv_compression_keepratio": 0.5}, ["kv_compression_keepratio", "kv_compression_keep_ratio"]),
    ],
)
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
