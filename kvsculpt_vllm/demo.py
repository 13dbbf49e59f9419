"""`make demo`: questions about a long document, answered from the exact KV cache, sculpted, and found sculpted."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from kvsculpt_vllm.models import fast_dtype, prepare
from kvsculpt_vllm.serving.launch import Server, read_metrics, serve

MODEL = "smollm2-135m"
KEEP_RATIO = 0.3
MAX_TOKENS = 90  # of an answer
COMPRESSED_BY = 3  # pieces of the answer; the prompt is compressed after the first token

QUESTION = (
    "What was the name of the merchant ship from which the bell was bought, and which fish made the village rich?"
)
FURTHER_QUESTIONS = ("Why did the town build a lighthouse?", "What did the painter Ludo Ferrant paint, and how often?")

console = Console()


@dataclass
class Answer:
    """One streamed answer, and what the server held for it."""

    text: str
    prompt_tokens: int
    blocks_held: int | None  # by vLLM's own gauge, in the middle of decoding; None if it was over before that answered
    first_token: float  # seconds until it
    seconds: float


def document() -> str:
    """A made-up town chronicle of about 1,500 tokens with the answer in its first third."""
    path = Path(__file__).with_name("demo_document.txt")
    return path.read_text(encoding="utf-8")


def ask(address: str, question: str, salt: str, **compression: Any) -> Answer:
    """Stream one answer; `compression` goes into `vllm_xargs`. Prompts of one `salt` find each other's cache."""
    client = OpenAI(base_url=f"{address}/v1", api_key="unused")
    begin = time.monotonic()
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"{document()}\n\n{question}"}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"vllm_xargs": compression, "cache_salt": salt},
    )
    text, prompt_tokens, arrivals = "", 0, []
    with BlockWatch(address) as watch:
        for chunk in stream:
            if chunk.usage:
                prompt_tokens = chunk.usage.prompt_tokens
            for choice in chunk.choices:
                if piece := choice.delta.content:
                    console.print(piece, end="", markup=False, highlight=False)
                    text += piece
                    arrivals.append(time.monotonic())
    console.print()
    if len(arrivals) <= COMPRESSED_BY:
        raise SystemExit(f"demo: the answer has only {len(arrivals)} pieces: {text!r}")
    blocks = watch.median(arrivals[COMPRESSED_BY], arrivals[-1])
    return Answer(text, prompt_tokens, blocks, arrivals[0] - begin, time.monotonic() - begin)


class BlockWatch:
    """A context that reads from vLLM's own `/metrics`, while a stream goes on, how many KV blocks requests hold."""

    def __init__(self, address: str) -> None:
        self._address, self._stop = address, threading.Event()
        self._readings: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> BlockWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def median(self, begin: float, end: float) -> int | None:
        """Compute the median of the readings between two moments, as `time.monotonic` tells them; None if a busy server
        gave none.
        """
        blocks = sorted(blocks for moment, blocks in self._readings if begin <= moment <= end)
        return blocks[len(blocks) // 2] if blocks else None

    def _read(self) -> None:
        while not self._stop.wait(0.02):
            families = read_metrics(self._address, timeout=60)
            samples = {sample.name: sample for family in families for sample in family.samples}
            # One block is the null block, which vLLM leaves out of the fraction.
            total = int(samples["vllm:cache_config_info"].labels["num_gpu_blocks"]) - 1
            blocks = round(samples["vllm:kv_cache_usage_perc"].value * total)
            self._readings.append((time.monotonic(), blocks))


def show(exact: Answer, sculpted: Answer, found: list[Answer], record: dict[str, Any]) -> None:
    """Print the table that compares the answers; `record` is of the compression."""
    answers = (exact, sculpted, *found)
    again = [f"found again, question {number}" for number, _ in enumerate(found, 2)]
    table = Table("", "exact", "sculpted", *again, title=f"{MODEL}, keep ratio {KEEP_RATIO}")
    table.add_row("prompt tokens", *(f"{answer.prompt_tokens:,}" for answer in answers))
    table.add_row("seconds to the first token", *(f"{answer.first_token:.2f}" for answer in answers))
    held = ("not seen" if answer.blocks_held is None else str(answer.blocks_held) for answer in answers)
    table.add_row("KV blocks held while decoding", *held)
    table.add_row("seconds to compress", "-", f"{record['seconds']:.2f}", *("0" for _ in found))
    table.add_row("seconds in all", *(f"{answer.seconds:.2f}" for answer in answers))
    errors = f"{record['error_after']:.4f} (selection alone {record['error_before']:.4f})"
    table.add_row("held-out error", "0", errors, *(f"{record['error_after']:.4f}" for _ in found))
    console.print(table)


def log_lines(server: Server, marker: str) -> None:
    """Show the lines of the server's log that say `marker`."""
    for line in server.log.read_text().splitlines():
        if marker in line:
            console.print(f"[dim]{line[line.index(marker) :]}[/dim]")


def main() -> None:
    """Run the demo; exits non-zero if anything failed."""
    flags = ["--max-model-len", "4096", "--kv-cache-memory-bytes", str(1 << 29), "--enforce-eager"]
    flags += ["--dtype", fast_dtype()]
    flags += ["--served-model-name", MODEL]
    flags += ["--kv-compression", "sculpt", "--kv-compression-keep-ratio", str(KEEP_RATIO)]
    flags += ["--kv-compression-effort", "fast"]
    model = prepare(MODEL)
    console.print(f"[dim]$ vllm serve {model} {' '.join(flags)}[/dim]")
    with console.status("starting the server"):
        stack = ExitStack()
        server = stack.enter_context(serve(model, *flags))
    with stack:
        log_lines(server, "KV compression:")
        console.print(f"\n[bold]{QUESTION}[/bold]\n")
        console.print("[bold]exact:[/bold] ", end="")
        # Of another salt than the others: each computes its prompt, so that they are alike but for compression.
        exact = ask(server.address, QUESTION, "exact", kv_compression="none")
        console.print("[bold]sculpted:[/bold] ", end="")
        sculpted = ask(server.address, QUESTION, "sculpted")
        found = []
        for question in FURTHER_QUESTIONS:
            console.print(f"\n[bold]{question}[/bold]\n")
            console.print("[bold]found sculpted:[/bold] ", end="")
            found.append(ask(server.address, question, "sculpted"))
        with urllib.request.urlopen(f"{server.address}/kvsculpt/requests", timeout=10) as response:
            stories = json.load(response)
        log_lines(server, "kvsculpt: request")
    outcomes = [story["outcome"] for story in reversed(stories)]
    if outcomes != ["skipped", "compressed", *("found" for _ in found)]:
        raise SystemExit(f"demo: the second request should have been sculpted and all others found it, not {stories}")
    console.print()
    show(exact, sculpted, found, next(story["compression"] for story in stories if story["compression"]))
    held = [answer.blocks_held for answer in (sculpted, *found) if answer.blocks_held is not None]
    if exact.blocks_held is None or not held:
        raise SystemExit(
            "demo: all answers were over before the busy server said how many blocks they held: run it alone"
        )
    if not 0 < max(held) < exact.blocks_held:
        raise SystemExit("demo: sculpted requests should have held fewer blocks than the exact one")
    if max(answer.first_token for answer in found) > exact.first_token:
        raise SystemExit("demo: what is found should be there before an exact prompt is computed")
    if not all(answer.text.strip() for answer in (sculpted, *found)):
        raise SystemExit("demo: a sculpted request gave no answer")


if __name__ == "__main__":
    main()
