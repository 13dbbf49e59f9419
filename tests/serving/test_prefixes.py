"""Prefixes by name, over HTTP: sculpted without an answer, found by their tokens, pinned, listed, freed."""

import json
import time
import urllib.error
import urllib.request

import pytest
import torch

from kvsculpt_vllm.demo import document
from kvsculpt_vllm.models import fast_dtype
from servers import KEY, PIN_BLOCKS

pytestmark = pytest.mark.engine

TEXT = document()


@pytest.fixture(scope="module")
def call(server):
    """The status and the JSON that one of our routes answers with."""

    def send(method, path, body=None, key=KEY):
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{server.address}/kvsculpt/prefixes{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                text = response.read()
                return response.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return send


def test_a_prefix_is_sculpted_without_an_answer_and_found_by_later_requests(call, post):
    messages = [{"role": "system", "content": TEXT}]
    status, made = call("POST", "", {"messages": messages, "name": "chronicle", "pin": True, "cache_salt": "p"})
    assert status == 201, made
    assert made["pinned"] and made["tokens_sculpted"] > 1000 and made["tokens_found"] == 0
    assert made["prompt_tokens"] - made["tokens_sculpted"] < 64 + 64  # sculpted to its end, but for the window

    # Beginning alike, it is found; to somebody else it is not there.
    body = {"messages": [*messages, {"role": "user", "content": "Who?"}], "max_tokens": 4, "temperature": 0}
    told = json.loads(post("/v1/chat/completions", body | {"cache_salt": "p"}))["kv_transfer_params"]["kv_compression"]
    assert (told["outcome"], told["tokens_found"]) == ("found", made["tokens_sculpted"])
    told = json.loads(post("/v1/chat/completions", body | {"cache_salt": "q"}))["kv_transfer_params"]["kv_compression"]
    assert told["tokens_found"] == 0

    status, kept = call("GET", "")
    (prefix,) = kept["prefixes"]
    assert status == 200
    assert (prefix["id"], prefix["name"], prefix["pinned"], prefix["hits"]) == (made["id"], "chronicle", True, 1)
    assert prefix["tokens"] == prefix["tokens_in_memory"] == made["tokens_sculpted"]
    assert kept["pinned_blocks"] == prefix["blocks"] == made["entries_held"] // 32
    assert kept["most_pinned_blocks"] == PIN_BLOCKS
    element = getattr(torch, fast_dtype()).itemsize  # as the server was told, by what this processor has
    assert prefix["bytes"] == prefix["blocks"] * 32 * 2 * 3 * 64 * 30 * element  # 3 KV heads of 64, 30 layers

    # The same again is there already; a second pin does not fit, and says what is in its way.
    status, again = call("POST", "", {"messages": messages, "name": "again", "cache_salt": "p"})
    assert (status, again["tokens_sculpted"], again["tokens_found"]) == (201, 0, made["tokens_sculpted"])
    assert call("DELETE", "/again")[0] == 204
    status, told = call("POST", "", {"prompt": TEXT, "pin": True, "name": "late"})
    assert status == 409 and "chronicle" in told and f"of {PIN_BLOCKS} blocks" in told
    status, told = call("POST", "", {"prompt": TEXT, "name": "chronicle"})
    assert status == 409 and made["id"] in told
    assert [prefix["name"] for prefix in call("GET", "")[1]["prefixes"]] == ["chronicle"]

    # One without a name goes by its id, and not with all that have none.
    status, nameless = call("POST", "", {"messages": messages, "cache_salt": "p"})
    assert (status, nameless["name"]) == (201, "")
    assert call("DELETE", "/")[0] == 404
    assert nameless["id"] in [prefix["id"] for prefix in call("GET", "")[1]["prefixes"]]
    assert call("DELETE", f"/{nameless['id']}")[0] == 204

    assert call("DELETE", "/chronicle") == (204, None)
    assert call("DELETE", "/chronicle")[0] == 404
    told = json.loads(post("/v1/chat/completions", body | {"cache_salt": "p"}))["kv_transfer_params"]["kv_compression"]
    assert told["tokens_found"] == 0
    status, made = call("POST", "", {"prompt": TEXT, "pin": True, "name": "late", "ttl": 0.01, "cache_salt": "r"})
    assert status == 201 and made["pinned"]
    time.sleep(0.1)
    assert "late" not in [prefix["name"] for prefix in call("GET", "")[1]["prefixes"]]  # its time is over
    assert call("GET", "")[1]["pinned_blocks"] == 0


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "messages or prompt"),
        ({"prompt": TEXT, "messages": [{"role": "user", "content": "x"}]}, "messages or prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": TEXT, "ttl": -1}, "ttl"),
        ({"prompt": TEXT, "ttl": "soon"}, "ttl"),
        ({"prompt": TEXT, "pin": "perhaps"}, "pin"),
        ({"prompt": TEXT, "effort": "heroic"}, "kv_compression_effort"),
        ({"prompt": TEXT, "tools": []}, "tools"),
        ({"prompt": TEXT, "temperature": 0}, "temperature"),
        ({"prompt": TEXT, "cache_salt": ""}, "cache_salt"),
        ({"prompt": TEXT, "model": "another"}, "another"),
        ({"prompt": TEXT, "name": "x" * 201}, "name"),
        ({"prompt": "too short"}, "min_tokens"),
        ({"prompt": TEXT * 4}, "2560"),
        ({"messages": [{"content": TEXT}]}, "role"),
        ({"messages": "hello"}, "messages"),
        ([], ""),
    ],
)
def test_bad_input_is_told(call, body, told):
    status, text = call("POST", "", body)
    assert 400 <= status < 500, text
    assert told in text


def test_prefixes_are_behind_the_key_and_no_client_can_pose_as_the_route(call, post):
    assert call("GET", "", key="")[0] == call("POST", "", {"prompt": TEXT}, key="wrong")[0] == 401
    assert call("DELETE", "/x", key="wrong")[0] == 401
    with pytest.raises(urllib.error.HTTPError) as refused:
        post("/v1/completions", {"prompt": TEXT, "max_tokens": 4, "vllm_xargs": {"kvsculpt_prefix": "x"}})
    assert refused.value.code == 400
