"""What operators see of a running server: metrics, statistics, the page, and who may see them."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request

import pytest
from typer.testing import CliRunner

from kvsculpt_vllm.cli import app
from kvsculpt_vllm.demo import document
from kvsculpt_vllm.serving.launch import read_metrics

pytestmark = pytest.mark.engine


def metrics(server):
    """All samples of `kvsculpt:` that /metrics shows, by name and labels."""
    told = read_metrics(server.address, timeout=60)
    assert any(family.name == "vllm:num_requests_running" for family in told)  # vLLM's own are there as before
    families = [family for family in told if family.name.startswith("kvsculpt:")]
    assert all(family.documentation for family in families)
    return {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "engine")): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_and_statistics_tell_the_same_numbers(server, client, get):
    client.completions.create(model="tiny", prompt="Hello", max_tokens=2)
    completion = client.completions.create(
        model="tiny",
        prompt=document(),
        max_tokens=4,
        extra_body={"ignore_eos": True, "vllm_xargs": {"kv_compression": "select", "kv_compression_budget": "uniform"}},
    )
    stats, samples = get("/kvsculpt/stats"), metrics(server)
    assert stats["age_seconds"] < 5
    for outcome, reasons in stats["requests"].items():
        for reason, count in reasons.items():
            assert samples["kvsculpt:requests_total", outcome, reason] == count
    assert stats["requests"]["skipped"]["short"] >= 1
    for name in ("span_tokens", "entries_kept", "blocks_freed", "bytes_freed", "solver_steps"):
        assert samples[f"kvsculpt:{name}_total",] == stats[name]
    assert stats["blocks_freed"] > 0
    count = sum(stats["seconds"]["counts"])
    assert samples["kvsculpt:compression_seconds_count",] == count
    assert samples["kvsculpt:compression_seconds_bucket", "+Inf"] == count
    assert samples["kvsculpt:compression_seconds_sum",] == pytest.approx(stats["seconds"]["sum"])
    assert samples["kvsculpt:held_out_error_count", "after"] == count
    # Nothing runs now: vLLM's pool is empty, and so is what is saved in it.
    assert samples["kvsculpt:blocks_saved",] == samples["kvsculpt:pool_blocks_used",] == 0
    newest = get("/kvsculpt/requests?limit=1")
    assert newest[0]["request_id"].startswith(completion.id)
    assert "budgets" not in newest[0]["compression"]


def test_an_unknown_request_is_a_404_and_a_wrong_limit_a_400(get):
    for path, code in (("/kvsculpt/requests/no/such", 404), ("/kvsculpt/requests?limit=0", 400)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(path)
        assert refused.value.code == code


@pytest.mark.parametrize("path", ["/kvsculpt", "/kvsculpt/stats", "/kvsculpt/requests", "/kvsculpt/requests/x"])
@pytest.mark.parametrize(
    "credentials", [None, "Bearer wrong", "Basic " + base64.b64encode(b"x:wrong").decode(), "Basic %"]
)
def test_nothing_is_shown_without_the_servers_key(server, path, credentials):
    headers = {"Authorization": credentials} if credentials else {}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(server.address + path, headers=headers), timeout=60)
    assert refused.value.code == 401
    assert refused.value.headers["WWW-Authenticate"].startswith("Basic")  # a browser asks for it


@pytest.fixture(scope="module")
def page(server):
    headers = {"Authorization": "Basic " + base64.b64encode(b"anyone:a secret").decode()}
    with urllib.request.urlopen(urllib.request.Request(f"{server.address}/kvsculpt", headers=headers)) as response:
        return response.read().decode(), response.headers


def test_the_page_loads_nothing_from_elsewhere_and_its_policy_allows_its_own_script(page):
    text, headers = page
    assert not re.search(r"""(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", text)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in text  # ids and reasons come from clients


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_browser_draws_what_the_server_tells(server, get, tmp_path):
    address = server.address.replace("http://", "http://anyone:a%20secret@")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    quiet += "--disable-component-update --disable-sync --virtual-time-budget=4000 --dump-dom"
    command = ["chromium", *quiet.split(), f"--user-data-dir={tmp_path}", f"{address}/kvsculpt"]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=240).stdout
    newest = next(story for story in get("/kvsculpt/requests") if story["compression"])
    assert f"{newest['request_id']}: " in drawn
    assert drawn.count("<rect") == 2 * 30 * 3  # two heat maps
    assert f"of {get('/kvsculpt/stats')['pool']['total']:,}" in drawn


def test_the_doctor_finds_the_server_well_and_says_what_is_missing_without_the_key(server, get):
    get("/kvsculpt/stats")
    for key, code in (("a secret", 0), ("wrong", 1)):
        result = CliRunner().invoke(app, ["doctor", "--url", server.address, "--api-key", key])
        assert result.exit_code == code, result.output
        assert ("give --api-key" in result.output) == (code == 1)
    assert json.loads(json.dumps(get("/kvsculpt/stats")))["requests"]["failed"] == {}
