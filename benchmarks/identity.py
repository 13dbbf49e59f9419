"""Are tokens those of stock vLLM where every entry is kept? With CUDA graphs and asynchronous scheduling, in float32.

    python benchmarks/identity.py --device cuda               # both model runners
    python benchmarks/identity.py --device cuda --sync-check  # real compressions under VLLM_GPU_SYNC_CHECK=error
    python benchmarks/identity.py --device cpu                # without a GPU: vLLM's CPU kernels, eager

The engine is that of `tests/engine/engine_job.py`: the method keeps every entry, in packed pages of shuffled order, and
what vLLM had in the freed blocks is overwritten, so that a wrong page shows as other tokens. In float32, because in 16
bits another kernel's rounding alone changes tokens. With `--sync-check` the method is the real one; what waits for the
device inside a step of vLLM's ends the engine, and a solve that fails shows as a request that was not compressed.
Prints a table and ends with one JSON line; the exit code is 1 if anything is not as it should be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvsculpt_vllm.models import MODELS, prepare

JOB = Path(__file__).resolve().parents[1] / "tests" / "engine" / "engine_job.py"
DEVICES = ("cpu", "cuda")
SHORT = 60  # tokens of a prompt that stays exact


def jobs(directory: str, device: str, prompt: int, answer: int, sync_check: bool) -> dict[str, dict[str, Any]]:
    """The engines to run, by name: stock vLLM first, unless nothing is compared with it."""
    engine: dict[str, Any] = {"model": directory, "dtype": "float32", "enable_prefix_caching": False}
    engine |= {"max_model_len": 2 * prompt + answer + 64, "max_num_batched_tokens": 256, "block_size": 32}
    if device == "cuda":
        # Few sizes, so that recording them takes seconds; no batch here has more rows.
        graphs = {"cudagraph_capture_sizes": [1, 2, 4]}
        engine |= {"enforce_eager": False, "async_scheduling": True, "compilation_config": graphs}
        # It takes 20 seconds, of kernels for other batches and dtypes.
        engine |= {"kernel_config": {"enable_jit_warmup": False}}
        # The share of a GPU that vLLM takes is checked at start-up even where the cache's bytes are given.
        engine |= {"block_size": 16, "kv_cache_memory_bytes": 4 << 30, "gpu_memory_utilization": 0.1}
    requests = [
        {"start": 0, "length": 2 * prompt, "max_tokens": answer, "extra_args": None},
        {"start": 3 * prompt, "length": SHORT, "max_tokens": answer, "extra_args": None, "after": 2},
        {"start": 4 * prompt, "length": prompt, "max_tokens": answer // 2, "extra_args": None, "after": 3},
    ]
    # Room for the queries of all prompts at once: without prefix caching none is computed again when there is room.
    stock = {"engine": engine, "batches": [requests], "cuda": device == "cuda", "sampled_segments": 16}
    settings = {"method": "sculpt" if sync_check else "select", "min_tokens": 2 * SHORT, "window": 32}
    settings |= {"segment": prompt // 2, "decode": prompt // 2, "max_stall_ms": 60_000, "effort": "fast"}
    ours = {**stock, "engine": {**engine, "additional_config": {"kv_compression": settings}}}
    if sync_check:
        return {"V2": {**ours, "v2": True}} if device == "cuda" else {"V1": ours}
    ours |= {"identity": True, "poison": True}
    return {"stock": stock, "V1": ours} | ({"V2": {**ours, "v2": True}} if device == "cuda" else {})


def ran(job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """What an engine answers to a job. What it logs goes to stderr.

    Raises:
        SystemExit: it ended without an answer.
    """
    done = subprocess.run(
        [sys.executable, str(JOB)], input=json.dumps(job) + "\n", stdout=subprocess.PIPE, text=True, env=environment
    )
    if not done.stdout:
        raise SystemExit(f"the engine ended with {done.returncode}: its log is above")
    return json.loads(done.stdout)


def compared(result: dict[str, Any], wanted: list[list[int]] | None) -> dict[str, Any]:
    """What is told of one engine of ours beside the tokens of stock vLLM."""
    (told,), (tokens,) = result["told"], result["tokens"]
    row: dict[str, Any] = {
        "scheduler": result["scheduler"],
        "outcomes": [f"{one['outcome']} {one['reason'] or ''}".strip() for one in told],
        "segments": [one["segments"] for one in told],
    }
    # The long prompts are packed, and the short one is not.
    row["as_wanted"] = [count > 0 for count in row["segments"]] == [True, False, True]
    if wanted is not None:
        row["tokens"] = sum(map(len, wanted))
        row["equal"] = sum(
            a == b for mine, theirs in zip(tokens, wanted, strict=True) for a, b in zip(mine, theirs, strict=False)
        )
        row["as_wanted"] = row["as_wanted"] and tokens == wanted
    return row


def main(
    model: Annotated[str, typer.Option(help=f"A directory, or one of {', '.join(MODELS)}.")] = "smollm2-135m",
    device: Annotated[str, typer.Option(help=f"What vLLM runs on here: {', '.join(DEVICES)}.")] = "cpu",
    prompt: Annotated[int, typer.Option(min=256, help="Tokens; one prompt has twice as many.")] = 600,
    answer: Annotated[int, typer.Option(min=8, help="Tokens.")] = 48,
    sync_check: Annotated[bool, typer.Option("--sync-check", help="Compress, and look for waits.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="A file for the JSON line, too.")] = None,
) -> None:
    """Run the engines one after the other and compare."""
    if device not in DEVICES:
        raise typer.BadParameter(f"got {device}, allowed: {', '.join(DEVICES)}", param_hint="--device")
    directory = str(prepare(model)) if model in MODELS else model
    environment = dict(os.environ)
    if sync_check:
        environment["VLLM_GPU_SYNC_CHECK"] = "error"
    rows, wanted = {}, None
    for name, job in jobs(directory, device, prompt, answer, sync_check).items():
        result = ran(job, environment)
        if name == "stock":
            (wanted,) = result["tokens"]
        else:
            rows[name] = compared(result, wanted)
    table = Table("model runner", "scheduler", "segments", "tokens equal", "as wanted")
    for name, row in rows.items():
        told = f"{row['equal']} of {row['tokens']}" if wanted is not None else "not compared"
        table.add_row(name, row["scheduler"], str(row["segments"]), told, "yes" if row["as_wanted"] else "NO")
    Console(width=120).print(table)
    good = all(row["as_wanted"] for row in rows.values())
    line = {
        "benchmark": "identity",
        "model": Path(directory).name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "vllm": version("vllm"),
        "graphs": device == "cuda",
        "sync_check": sync_check,
        "runners": rows,
        "as_wanted": good,
    }
    if json_path is not None:
        json_path.write_text(json.dumps(line) + "\n")
    print(json.dumps(line))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
