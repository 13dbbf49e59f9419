"""Several API servers over one engine: each tells the engine's numbers, none counts twice, all end with it."""

import os
import signal
from pathlib import Path

import pytest
from openai import OpenAI

from kvsculpt_vllm.models import fast_dtype
from kvsculpt_vllm.serving.launch import read_metrics, serve

pytestmark = pytest.mark.engine

EXIT_SECONDS = 120


@pytest.fixture(scope="module")
def pair(first_layers_path):
    flags = (
        "--max-model-len",
        "2048",
        "--kv-cache-memory-bytes",
        str(1 << 28),
        "--dtype",
        fast_dtype(),
        "--enforce-eager",
        "--block-size",
        "32",
    )
    flags += ("--api-server-count", "2", "--served-model-name", "tiny", "--kv-compression", "select")
    with serve(
        first_layers_path, *flags, "--kv-compression-min-tokens", "96", "--kv-compression-budget", "uniform"
    ) as running:
        yield running


def requests_told(server):
    families = read_metrics(server.address, timeout=60)
    assert any(family.name == "vllm:num_requests_running" for family in families)
    return {
        (sample.labels["outcome"], sample.labels["reason"]): sample.value
        for family in families
        if family.name == "kvsculpt:requests"
        for sample in family.samples
    }


def test_every_server_tells_the_engines_numbers(pair):
    client = OpenAI(base_url=f"{pair.address}/v1", api_key="unused", max_retries=0)
    for length in (200, 20, 210, 220):  # no two begin alike
        prompt = list(range(10 * length, 11 * length))
        client.completions.create(model="tiny", prompt=prompt, max_tokens=4, extra_body={"ignore_eos": True})
    # Each scrape is a connection of its own, which either server may take.
    told = [requests_told(pair) for _ in range(8)]
    assert all(samples["compressed", ""] == 3 and samples["skipped", "short"] == 1 for samples in told)


def test_a_killed_worker_ends_the_server_as_it_does_in_stock_vllm(pair):
    """It says so, and does not linger without an engine."""
    worker = next(
        pid
        for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
        if os.getsid(pid) == pair.process.pid and "VLLM::Worker" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    os.kill(worker, signal.SIGKILL)
    assert pair.process.wait(EXIT_SECONDS) != 0
    log = pair.log.read_text()
    assert "died" in log or "EngineDeadError" in log
