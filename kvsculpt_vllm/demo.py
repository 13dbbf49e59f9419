"""`make demo`: one question about a long document, answered from the exact and from the sculpted KV cache."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from kvsculpt_vllm.models import prepare

MODEL = "smollm2-135m"
KEEP_RATIO = 0.3
START_UP_SECONDS = 180
READ_BLOCKS_AT = 4  # pieces of the answer: the prompt is compressed after the first token, and the answer goes on

QUESTION = "In one or two sentences: why did the town build the lighthouse, and who looked after it?"

console = Console()


@dataclass
class Answer:
    """One streamed answer, and what the server held for it."""

    text: str
    prompt_tokens: int
    blocks_held: int  # by vLLM's own gauge, in the middle of decoding
    seconds: float


def document() -> str:
    """A made-up town chronicle of about 1,500 tokens with the answer in its first third."""
    path = Path(__file__).with_name("demo_document.txt")
    return path.read_text(encoding="utf-8")


@contextmanager
def server(model: Path) -> Iterator[str]:
    """`vllm serve` with compression on a free port; yields its address. Shows the log's end if it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "4096"]
    command += ["--kv-cache-memory-bytes", str(1 << 29), "--no-enable-prefix-caching", "--enforce-eager"]
    command += ["--kv-compression", "sculpt", "--kv-compression-keep-ratio", str(KEEP_RATIO)]
    command += ["--kv-compression-effort", "fast"]
    console.print("[dim]$ " + " ".join(["vllm", *command[1:]]) + "[/dim]")
    environment = {**os.environ, "VLLM_PLUGINS": "kvsculpt"}  # endpoint plugins load only if they are named
    with NamedTemporaryFile("w+", prefix="kvsculpt-demo-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            with console.status("starting the server"):
                _wait_until_ready(process, address, Path(log.name))
            for line in Path(log.name).read_text().splitlines():
                if "KV compression:" in line:
                    console.print("[dim]" + line[line.index("KV compression:") :] + "[/dim]")
            yield address
            for line in Path(log.name).read_text().splitlines():
                if "kvsculpt: request" in line:
                    console.print("[dim]" + line[line.index("kvsculpt: request") :] + "[/dim]")
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_until_ready(process: subprocess.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + START_UP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    console.print(log.read_text()[-4000:], markup=False)
    raise SystemExit(f"demo: the server did not start within {START_UP_SECONDS} s; its whole log is {log}")


def ask(address: str, **compression: Any) -> Answer:
    """Stream one answer; `compression` goes into `vllm_xargs`."""
    client = OpenAI(base_url=f"{address}/v1", api_key="unused")
    begin = time.monotonic()
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"{document()}\n\n{QUESTION}"}],
        temperature=0,
        max_tokens=120,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"vllm_xargs": compression},
    )
    text, prompt_tokens, num_pieces, blocks = "", 0, 0, 0
    for chunk in stream:
        if chunk.usage:
            prompt_tokens = chunk.usage.prompt_tokens
        for choice in chunk.choices:
            if piece := choice.delta.content:
                console.print(piece, end="", markup=False, highlight=False)
                text += piece
                num_pieces += 1
                if num_pieces == READ_BLOCKS_AT:
                    blocks = blocks_in_use(address)
    console.print()
    return Answer(text, prompt_tokens, blocks, time.monotonic() - begin)


def blocks_in_use(address: str) -> int:
    """KV blocks that requests hold now, from vLLM's own `/metrics`."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
    samples = {sample.name: sample for family in families for sample in family.samples}
    # One block is the null block, which vLLM leaves out of the fraction.
    total = int(samples["vllm:cache_config_info"].labels["num_gpu_blocks"]) - 1
    return round(samples["vllm:kv_cache_usage_perc"].value * total)


def show(exact: Answer, sculpted: Answer, record: dict[str, Any]) -> None:
    """The table."""
    table = Table("", "exact", "sculpted", title=f"{MODEL}, keep ratio {KEEP_RATIO}")
    table.add_row("prompt tokens", f"{exact.prompt_tokens:,}", f"{sculpted.prompt_tokens:,}")
    table.add_row("KV blocks held while decoding", str(exact.blocks_held), str(sculpted.blocks_held))
    table.add_row("seconds in all", f"{exact.seconds:.2f}", f"{sculpted.seconds:.2f}")
    table.add_row("bytes freed", "-", f"{record['bytes_freed']:,}")
    table.add_row("seconds to compress", "-", f"{record['seconds']:.2f}")
    errors = f"{record['error_after']:.4f} (selection alone {record['error_before']:.4f})"
    table.add_row("held-out error", "0", errors)
    console.print(table)


def main() -> None:
    """Run the demo; exits non-zero if anything failed."""
    with server(prepare(MODEL)) as address:
        console.print(f"\n[bold]{QUESTION}[/bold]\n")
        console.print("[bold]exact:[/bold] ", end="")
        exact = ask(address, kv_compression="none")
        console.print("[bold]sculpted:[/bold] ", end="")
        sculpted = ask(address)
        with urllib.request.urlopen(f"{address}/kv_compression", timeout=10) as response:
            records = json.load(response)["requests"]
    if len(records) != 1:
        raise SystemExit(f"demo: exactly the second request should have been compressed, the server reports {records}")
    console.print()
    show(exact, sculpted, records[0])
    if not 0 < sculpted.blocks_held < exact.blocks_held:
        raise SystemExit("demo: the sculpted request should have held fewer blocks than the exact one")
    if not sculpted.text.strip():
        raise SystemExit("demo: the sculpted request gave no answer")


if __name__ == "__main__":
    main()
