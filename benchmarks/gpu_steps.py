"""What `benchmarks/gpu_day.sh` runs: its steps, what is told of their results, and the targets for an H100."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

MODEL = "{model}"  # in a step's arguments

Read = Callable[[str], "dict[str, Any] | None"]
Figures = Callable[[dict[str, Any]], Iterator[str]]


def last_json(printed: str) -> dict[str, Any] | None:
    """The JSON document that a program's output is, or that its last line is; None if there is none."""
    for text in (printed, printed.strip().rpartition("\n")[2]):
        with suppress(json.JSONDecodeError):
            found = json.loads(text)
            if isinstance(found, dict):
                return found
    return None


def pytest_summary(printed: str) -> dict[str, Any] | None:
    """How many tests passed, failed and were skipped; None if none has passed."""
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", printed)}
    return counts if counts.get("passed") else None


@dataclass(frozen=True)
class Step:
    """One program and the time that it may take."""

    name: str
    what: str  # it does, for people
    seconds: int  # at most, with what it takes to end it
    program: tuple[str, ...]  # Python's arguments
    arguments: tuple[str, ...]  # the program's, on a GPU
    rehearsal: tuple[str, ...]  # the same on a CPU
    figures: Figures
    read: Read = last_json
    interpreted: bool = False  # whether a rehearsal is Triton's interpreter's
    serves: bool = False  # whether it starts vLLM's engine: a rehearsal takes minutes then
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, model: str, rehearse: bool) -> list[str]:
        """The command line."""
        arguments = self.rehearsal if rehearse else self.arguments
        return [sys.executable, *self.program, *(model if word == MODEL else word for word in arguments)]


def of_selftest(result: dict[str, Any]) -> Iterator[str]:
    """Its figures on the page."""
    failed = [one for one in result["measured"] if not one["passed"]]
    yield f"{len(result['measured'])} comparisons, {len(failed)} failed, in {result['seconds']} s"
    yield from (f"FAILED: {one['kernel']}, {one['case']}: off by {one['error']:.3g}" for one in failed[:10])
    yield from (f"left out: {why}" for why in result["left_out"])


def of_tests(result: dict[str, Any]) -> Iterator[str]:
    """Their figures on the page."""
    yield ", ".join(f"{count} {what}" for what, count in result.items())


def of_kernels(result: dict[str, Any]) -> Iterator[str]:
    """The figures of `kernels.py` on the page."""
    yield f"copy: {result['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    for row in result["attention"]:
        yield (
            f"{row['tokens']} tokens × {row['batch']}, {row['layout'] or 'dense'}, {row['layers']} layers, "
            f"{row['system']}: {row['seconds'] * 1e3:.3f} ms, {row['of_copy']:.2f} of copy's bytes/s"
        )
    for row in result["attention_loss"]:
        yield (
            f"loss and gradient of {row['batch']} problems, {row['queries']} × {row['entries']}: "
            f"{row['seconds'] * 1e3:.3g} ms, {row['flop_per_second'] / 1e12:.3g} TFLOP/s"
        )


def of_solver(result: dict[str, Any]) -> Iterator[str]:
    """The figures of `solver.py` on the page."""
    runs = ", ".join(f"{seconds:.3f}" for seconds in result["segment_runs"])
    yield f"a segment as an engine makes it: median {result['segment_seconds']:.3f} s of {runs}"
    if result["segment_peak_bytes"] is not None:
        yield f"memory that it takes: {result['segment_peak_bytes'] / 2**30:.2f} GiB"
    yield f"with a pilot and all problems at once: {result['seconds']:.3f} s"
    if "whole_ratio" in result:
        yield f"times faster than torch.optim.LBFGS head by head: {result['whole_ratio']['held_out']}"


def of_identity(result: dict[str, Any]) -> Iterator[str]:
    """The figures of `identity.py` on the page."""
    for runner, row in result["runners"].items():
        told = f"{row['equal']} of {row['tokens']} tokens equal" if "equal" in row else "tokens not compared"
        yield f"{runner}, {row['scheduler']}: {told}; {', '.join(row['outcomes'])}; segments {row['segments']}"


def of_serving(result: dict[str, Any]) -> Iterator[str]:
    """The figures of `serving.py` on the page."""
    for row in result["capacity"]:
        held = f"{row['held_at_once']} of {row['arrived']} held at once"
        yield f"{row['system']}: {held}, {row['preemptions']} preemptions"
    for row in result["throughput"]:
        yield (
            f"{row['system']}, {row['concurrency']} at a time: {row['output_throughput']:.1f} tokens/s, first token "
            f"{row['median_ttft_ms'] / 1000:.3f} s, then {row['median_tpot_ms']:.1f} ms each (medians)"
        )
    if "none_over_stock" in result:
        yield f"every request `none`, against stock: {result['none_over_stock']:.2f} of its tokens/s"


def of_reuse(result: dict[str, Any]) -> Iterator[str]:
    """The figures of `reuse.py` on the page."""
    for when, both in result["many"].items():
        yield (
            f"{when}: {both['plugin']['requests_per_s']:.2f} requests/s, {both['requests_ratio']:.2f} times stock's; "
            f"first token {both['first_token_ratio']:.2f} times sooner"
        )


KVSCULPT = ("-c", "from kvsculpt_vllm.cli import main; main()")
TINY_TEST = ("--layers", "2", "--heads", "2", "--kv-heads", "1", "--head-size", "16", "--dtype", "float32")

STEPS = (
    Step(
        "selftest",
        "kernels against their twins, vLLM's and float64, as a server does at its start (Llama-3.1-8B's numbers)",
        60,
        KVSCULPT,
        ("selftest", "--json", "--layers", "32"),
        ("selftest", "--json", *TINY_TEST),
        of_selftest,
        interpreted=True,
    ),
    Step(
        "selftest-blhnc",
        "the same in the other layout, with Qwen2.5-1.5B's numbers",
        45,
        KVSCULPT,
        (*("selftest", "--json", "--layout", "BLHNC", "--layers", "28"), *("--heads", "12", "--kv-heads", "2")),
        ("selftest", "--json", "--layout", "BLHNC", *TINY_TEST),
        of_selftest,
        interpreted=True,
    ),
    Step(
        "kernel-tests",
        "the tests of kernels, compiled",
        135,
        ("-m", "pytest"),
        ("-q", "-p", "no:cacheprovider", "tests/kernels"),
        ("-q", "-p", "no:cacheprovider", "tests/kernels/test_pages.py"),
        of_tests,
        read=pytest_summary,
        interpreted=True,
    ),
    Step(
        "kernels",
        "decoding against FlashAttention as vLLM uses it, in both layouts, and the solver's loss",
        180,
        ("benchmarks/kernels.py",),
        (
            *("--tokens", "32768", "--tokens", "8192", "--batch", "16", "--batch", "1", "--batch", "64"),
            *("--keep-ratio", "1", "--keep-ratio", "0.3", "--keep-ratio", "0.1"),
        ),
        (
            *("--tokens", "96", "--batch", "2", "--keep-ratio", "0.3", "--segments", "1"),
            *("--query-heads", "4", "--kv-heads", "2", "--head-size", "16"),
        ),
        of_kernels,
        interpreted=True,
    ),
    Step(
        "solver",
        "a segment of 2,048 tokens and its window, in Qwen2.5-1.5B's shape",
        90,
        ("benchmarks/solver.py",),
        ("--shape", "qwen2.5-1.5b", "--context", "2112", "--device", "cuda", "--every", "14"),
        ("--shape", "tiny", "--context", "320", "--effort", "fast", "--every", "2", "--runs", "1"),
        of_solver,
    ),
    Step(
        "identity",
        "tokens of stock vLLM where every entry is kept: graphs, asynchronous scheduling, both model runners",
        300,
        ("benchmarks/identity.py",),
        ("--model", MODEL, "--device", "cuda"),
        ("--model", MODEL, "--device", "cpu", "--prompt", "256", "--answer", "8"),
        of_identity,
        serves=True,
    ),
    Step(
        "sync-check",
        "real compressions while vLLM looks for waits inside its steps (VLLM_GPU_SYNC_CHECK=error)",
        180,
        ("benchmarks/identity.py",),
        ("--model", MODEL, "--device", "cuda", "--sync-check"),
        ("--model", MODEL, "--device", "cpu", "--sync-check", "--prompt", "256", "--answer", "8"),
        of_identity,
        serves=True,
    ),
    Step(
        "serving",
        "capacity and throughput beside stock vLLM at the same KV memory",
        270,
        ("benchmarks/serving.py",),
        (
            *("--model", MODEL, "--device", "cuda", "--dtype", "bfloat16", "--parts", "capacity,throughput"),
            *("--rounds", "1", "--concurrency", "16"),
        ),
        (
            *("--model", MODEL, "--parts", "capacity,throughput", "--rounds", "1", "--concurrency", "2"),
            *("--sequences", "2", "--prompt-tokens", "600", "--output-tokens", "8"),
        ),
        of_serving,
        serves=True,
    ),
    Step(
        "reuse",
        "questions about documents, more than the memory holds exactly, beside stock vLLM",
        240,
        ("benchmarks/reuse.py",),
        (
            *("--model", MODEL, "--device", "cuda", "--dtype", "bfloat16", "--parts", "many"),
            *("--documents", "16", "--questions", "4", "--room", "6"),
        ),
        (
            *("--model", MODEL, "--parts", "many", "--documents", "2", "--questions", "1", "--room", "2"),
            *("--tokens", "640", "--users", "1", "--answer", "8"),
        ),
        of_reuse,
        serves=True,
    ),
)
"""In the order in which they are run: what later figures depend on comes first."""


@dataclass(frozen=True)
class Target:
    """A figure that was set before it was measured, for an H100."""

    what: str
    step: str  # that measures it
    value: Callable[[dict[str, Any]], float | None]
    least: float | None = None
    most: float | None = None

    def told(self) -> str:
        """What the figure is to be."""
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"

    def met(self, value: float) -> bool:
        """Whether it is."""
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)


def _of_layout(layout: str, name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda result: result["targets"][layout][name]


TARGETS = (
    *(
        Target(f"decoding, 32k × 16, {layout}: {name}", "kernels", _of_layout(layout, name), least=least)
        for layout in ("LBHNC", "BLHNC")
        for name, least in (
            ("times faster than FlashAttention at keep 0.3", 2.5),
            ("share of a copy's bandwidth at keep 0.3", 0.8),
            ("times faster than FlashAttention at keep 1", 0.9),
        )
    ),
    Target("a segment of Qwen2.5-1.5B, seconds", "solver", lambda result: result["segment_seconds"], most=0.2),
)
