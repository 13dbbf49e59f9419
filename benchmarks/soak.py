"""Several hundred requests of all kinds against a server that is short of KV memory: nothing may leak, break or lie.

Lengths, methods and settings are mixed at random, a fifth of the requests is cancelled in mid-stream, some
are wrong. The second half comes twice: what its first time leaves in memory is the allocators', what its second time
adds would be a leak. Afterwards: as many blocks free as at the start, memory flat, no 5xx, and every answer of a
request with `none` the answer of stock vLLM. Ends with one JSON line; the exit code says whether all of it holds.
"""

from __future__ import annotations

import json
import os
import random
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from openai import APIError, APIStatusError, OpenAI
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvsculpt_vllm.models import MODELS, fast_dtype, prepare
from kvsculpt_vllm.serving.launch import Server, read_metrics, serve

MODEL = "model"
LENGTHS = (1, 31, 32, 33, 120, 300, 511, 512, 513, 650, 800, 1000)
OUTPUT_TOKENS = (1, 2, 3, 8, 24, 90)
PROMPTS = 36
CANCELLED = 0.2
SETTLE_SECONDS = 60

UNIFORM = {"kv_compression_budget": "uniform"}  # without a pilot, so that hundreds of compressions take minutes
SETTINGS: list[tuple[int, dict[str, Any]]] = [  # weight, vllm_xargs
    (40, {"kv_compression": "none"}),
    (24, {"kv_compression": "select", "kv_compression_min_tokens": 96} | UNIFORM),
    (8, {"kv_compression": "select", "kv_compression_keep_ratio": 0.1} | UNIFORM),
    (5, {"kv_compression": "select_fit", "kv_compression_window": 200} | UNIFORM),
    (3, {"kv_compression": "select"}),
    (2, {"kv_compression": "sculpt", "kv_compression_keep_ratio": 0.5} | UNIFORM),
    (5, {"kv_compression": "select", "kv_compression_max_error": 1e-6} | UNIFORM),
    (5, {"kv_compression": "select", "kv_compression_keep_ratio": 1.0}),
    (4, {"kv_compression": "select", "kv_compression_on_failure": "select", "kv_compression_sink": 0} | UNIFORM),
]
WRONG: list[tuple[int, dict[str, Any]]] = [
    (2, {"kv_compression_keep_ratio": 7}),
    (2, {"kv_compression": "sclupt"}),
]

console = Console(stderr=True)


@dataclass(frozen=True)
class Job:
    """One request."""

    prompt: int
    output_tokens: int
    settings: dict[str, Any]
    cancel_after: int | None  # pieces of the stream

    @property
    def exact(self) -> bool:
        """Whether stock vLLM's answer is wanted."""
        return self.settings.get("kv_compression") == "none" and self.cancel_after is None

    @property
    def wrong(self) -> bool:
        """Whether it is to be refused."""
        return any(self.settings == settings for _, settings in WRONG)


@dataclass
class Outcome:
    """What was seen."""

    statuses: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[Job, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def ask(server: Server, prompt: list[int], job: Job, outcome: Outcome) -> None:
    """Send one request, and look at what comes back."""
    client = OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0, timeout=900)
    body = {"ignore_eos": True} | ({"vllm_xargs": job.settings} if job.settings else {})
    try:
        stream = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=job.output_tokens, temperature=0, stream=True, extra_body=body
        )
        text = ""
        for count, chunk in enumerate(stream):
            if count == job.cancel_after:
                stream.close()
                outcome.statuses["cancelled"] += 1
                return
            text += "".join(choice.text for choice in chunk.choices)
    except APIStatusError as refused:
        outcome.statuses[f"HTTP {refused.status_code}"] += 1
        if refused.status_code != 400 or not job.wrong:
            outcome.problems.append(f"HTTP {refused.status_code} for {job}: {refused.message[:200]}")
        return
    except APIError as broken:  # in mid-stream
        outcome.statuses["broken"] += 1
        outcome.problems.append(f"broken off, {job}: {broken}")
        return
    outcome.statuses["answered"] += 1
    if job.wrong:
        outcome.problems.append(f"not refused: {job}")
    outcome.answers.append((job, text))


def run(server: Server, prompts: list[list[int]], jobs: list[Job], concurrency: int, what: str) -> Outcome:
    """All jobs, so many at a time."""
    outcome = Outcome()
    with ThreadPoolExecutor(concurrency) as pool:
        waiting = [pool.submit(ask, server, prompts[job.prompt], job, outcome) for job in jobs]
        for future in track(waiting, what, console=console):
            future.result()
    return outcome


def memory_of(server: Server) -> int:
    """Resident bytes of the server and its children."""
    process = psutil.Process(server.process.pid)
    return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)])


def stats_of(server: Server) -> dict[str, Any]:
    """The plugin's own totals."""
    with urllib.request.urlopen(f"{server.address}/kvsculpt/stats", timeout=600) as response:
        return json.load(response)


def preemptions_of(server: Server) -> int:
    """vLLM's count."""
    samples = [sample for family in read_metrics(server.address, timeout=600) for sample in family.samples]
    return int(sum(sample.value for sample in samples if sample.name == "vllm:num_preemptions_total"))


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within `SETTLE_SECONDS`."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def main(
    model: Annotated[str, typer.Option(help=f"A directory, or one of {', '.join(MODELS)}.")] = "smollm2-135m",
    requests: Annotated[int, typer.Option(help="In all, wrong and cancelled ones included.")] = 320,
    concurrency: int = 8,
    blocks: Annotated[int, typer.Option(help="KV blocks of 32 tokens: short of what eight prompts take.")] = 60,
    seed: int = 0,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Load a server with everything at once."""
    # The stock kernel then rounds a row alike whatever else is in the batch.
    os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
    directory = prepare(model) if model in MODELS else Path(model)
    rng = random.Random(seed)
    # A third of them begin alike, so that the prefix cache is hit.
    shared = [rng.randrange(200, 4000) for _ in range(max(LENGTHS))]
    prompts = []
    for i in range(PROMPTS):
        length = LENGTHS[i % len(LENGTHS)]
        common = length * 2 // 3 if i < PROMPTS // 3 else 0
        prompts.append(shared[:common] + [rng.randrange(200, 4000) for _ in range(length - common)])
    weights, settings = zip(*SETTINGS, *WRONG, strict=True)
    jobs = []
    for _ in range(requests):
        cancelled = rng.random() < CANCELLED
        tokens = max(OUTPUT_TOKENS) if cancelled else rng.choice(OUTPUT_TOKENS)
        cancel_after = rng.randrange(1, 8) if cancelled else None
        jobs.append(Job(rng.randrange(PROMPTS), tokens, rng.choices(settings, weights)[0], cancel_after))
    common = ["--served-model-name", MODEL, "--max-model-len", "1120", "--block-size", "32", "--enforce-eager"]
    common += ["--num-gpu-blocks-override", str(blocks), "--kv-cache-memory-bytes", str(1 << 29)]
    common += ["--dtype", fast_dtype(), "--max-num-batched-tokens", "512", "--max-num-seqs", str(concurrency)]
    plain = {(job.prompt, job.output_tokens) for job in jobs if job.exact}
    references = [Job(prompt, tokens, {}, None) for prompt, tokens in sorted(plain)]
    with serve(directory, *common) as stock:
        alone = run(stock, prompts, references, 1, "stock, one at a time")
        together = run(stock, prompts, references, concurrency, "stock, together")
    # A row's linear layers are rounded by the size of its batch: both are stock vLLM's answers.
    stock_answers: dict[tuple[int, int], set[str]] = {}
    for job, text in alone.answers + together.answers:
        stock_answers.setdefault((job.prompt, job.output_tokens), set()).add(text)

    # So short that a prompt becomes a chain of up to four, and an answer another segment.
    flags = ["--kv-compression-segment", "256", "--kv-compression-decode", "64", "--kv-compression-min-tokens", "256"]
    flags += ["--kv-compression", "sculpt", "--kv-compression-effort", "fast"]
    with serve(directory, *common, *flags) as server:
        half = len(jobs) // 2
        first = run(server, prompts, jobs[:half], concurrency, "first half")
        second = run(server, prompts, jobs[half:], concurrency, "second half")
        memory_then = memory_of(server)
        again = run(server, prompts, jobs[half:], concurrency, "second half again")
        settled = wait_for(lambda: stats_of(server)["pool"]["used"] == 0)
        memory_now, stats = memory_of(server), stats_of(server)
        preemptions = preemptions_of(server)
        errors = [line for line in server.log.read_text().splitlines() if "Traceback" in line]
    answers = first.answers + second.answers + again.answers
    exact = [(job, text) for job, text in answers if job.exact]
    unequal = [job for job, text in exact if text not in stock_answers[job.prompt, job.output_tokens]]
    result = {
        "model": model,
        "requests": len(jobs) + len(jobs[half:]),
        "concurrency": concurrency,
        "blocks": blocks,
        "statuses": dict(first.statuses + second.statuses + again.statuses),
        "outcomes": stats["requests"],
        "deferred": stats["deferred"],
        "segments": stats["found"] | {"made": stats["segments"]},
        "preemptions": preemptions,
        "exact_answers": len(exact),
        "exact_answers_unlike_stock": len(unequal),
        "stock_prompts_with_two_answers": sum(len(texts) > 1 for texts in stock_answers.values()),
        "blocks_used_after": stats["pool"]["used"],
        "memory_mib_before_repetition": memory_then >> 20,
        "memory_mib_after": memory_now >> 20,
        "tracebacks": len(errors),
        "problems": first.problems + second.problems + again.problems,
    }
    checks = {
        "all blocks came back": settled and stats["pool"]["saved"] == stats["pool"]["pending"] == 0,
        "memory is flat (5 %)": memory_now <= memory_then * 1.05,
        "no error but those asked for": not result["problems"],
        "no traceback in the log": not errors,
        "no failed compression": not stats["requests"]["failed"],
        "every exact answer is stock vLLM's": not unequal,
        "memory was short: something was preempted": preemptions > 0,
        "segments were found, adopted and evicted": all(stats["found"][n] > 0 for n in ("hits", "adopted", "evicted")),
        "something was compressed": sum(stats["requests"]["compressed"].values()) > 0,
    }
    table = Table(
        "check", "holds", title=f"soak of {result['requests']} requests, {concurrency} at a time, {blocks} blocks"
    )
    for name, holds in checks.items():
        table.add_row(name, "yes" if holds else "[red]NO[/red]")
    Console().print(table)
    result["checks"] = checks
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    raise typer.Exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    typer.run(main)
