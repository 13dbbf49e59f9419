"""A server with compression and an API key, shared by the tests that talk to it."""

import json
import urllib.request

import pytest
from openai import OpenAI

from kvsculpt_vllm.models import fast_dtype
from kvsculpt_vllm.serving.launch import serve
from servers import KEY, PIN_BLOCKS

FLAGS = ("--max-model-len", "2560", "--kv-cache-memory-bytes", str(1 << 29), "--enforce-eager", "--block-size", "32")
FLAGS += ("--dtype", fast_dtype())
FLAGS += ("--kv-compression", "sculpt", "--kv-compression-effort", "fast", "--served-model-name", "tiny")
FLAGS += ("--kv-compression-pin-blocks", str(PIN_BLOCKS))
FLAGS += ("--enable-scale-out",)  # /inference/v1/generate and what renders requests for it


@pytest.fixture(scope="session")
def server(model_path):
    with serve(model_path, *FLAGS, "--api-key", KEY) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    return OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="session")
def get(server):
    """The JSON that a path of the server answers with, its API key given."""

    def read(path):
        request = urllib.request.Request(server.address + path, headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    return read


@pytest.fixture(scope="session")
def post(server):
    """What a path of the server answers to a body, a dict or a text that is to be JSON."""

    def send(path, body):
        text = json.dumps({"model": "tiny"} | body) if isinstance(body, dict) else body
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        request = urllib.request.Request(server.address + path, text.encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()

    return send
