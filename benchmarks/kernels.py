"""`paged_attention` against vLLM's FlashAttention on the uncompressed cache, `attention_loss` against autograd.

    python benchmarks/kernels.py                      # on a GPU: a layer of Llama-3.1-8B in the cache of all of them
    TRITON_INTERPRET=1 python benchmarks/kernels.py   # without one: small sizes, correctness only, no speed is claimed

The cache is as an engine has it: one buffer with the cells of all layers, in both layouts that vLLM knows, its blocks
in random order. FlashAttention reads the same buffer, in the version and with the schedule that vLLM takes on this
device. Every case is first checked against attention over the same entries written out in torch. Attention that decodes
reads each entry once, so that its speed of light is memory: bytes a second are given beside those of a copy measured in
the same run. Prints tables with device and versions and ends with one JSON line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_cases import LAYOUTS, Cache, Case, Shape, blocks_for
from kvsculpt_vllm.kernels.attention_loss import attention_loss, attention_loss_twin

SPARE_BYTES = 3 << 30  # of a GPU's memory, beside the cache
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

console = Console(stderr=True)
out = Console(width=140)


def milliseconds(run: Callable[[], Any], device: torch.device, recorded: bool = False) -> float:
    """The median; on a GPU with its L2 cache emptied before each run. What is `recorded` is replayed from a CUDA graph,
    as a server decodes: launching takes as long as a short batch does.
    """
    if device.type == "cuda":
        if recorded:
            run()  # compiled by now
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            run = graph.replay
        return triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median")
    from torch.utils.benchmark import Timer

    return Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=0.05).median * 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    count = 1 << (30 if device.type == "cuda" else 24)
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / (milliseconds(lambda: target.copy_(source), device) / 1e3)


def flash_attention(shape: Shape, cache: Cache, tokens: int, rows: int) -> tuple[str, Callable[[], Tensor]] | None:
    """FlashAttention over the uncompressed cache as vLLM's backend calls it (`FlashAttentionImpl.forward`), in the
    version that vLLM takes on this device, with its name; None where vLLM has none.
    """
    if shape.device.type != "cuda" or find_spec("vllm") is None:
        return None
    from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    number = get_flash_attn_version(head_size=shape.head_size)
    if number is None:
        return None
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    case = Case.make(shape, tokens, rows, 1.0, 0)
    keys, values = map(canonicalize_singleton_dim_strides, cache.view.transpose(1, 2).split(shape.head_size, dim=-1))
    plan, splits = None, 0
    if number == 3:
        # As with full CUDA graphs, which a server decodes in: `flash_attn_max_num_splits_for_cuda_graph`.
        splits = 32
        plan = get_scheduler_metadata(
            batch_size=rows,
            max_seqlen_q=1,
            max_seqlen_k=tokens,
            num_heads_q=shape.query_heads,
            num_heads_kv=shape.kv_heads,
            headdim=shape.head_size,
            cache_seqlens=case.lens,
            qkv_dtype=shape.dtype,
            cu_seqlens_q=case.starts,
            page_size=shape.block_size,
            causal=True,
            num_splits=splits,
        )
    out = torch.empty_like(case.query)

    def run() -> Tensor:
        flash_attn_varlen_func(
            q=case.query,
            k=keys,
            v=values,
            out=out,
            max_seqlen_q=1,
            cu_seqlens_q=case.starts,
            max_seqlen_k=tokens,
            seqused_k=case.lens,
            softmax_scale=shape.head_size**-0.5,
            causal=True,
            block_table=case.block_table,
            scheduler_metadata=plan,
            num_splits=splits,
            fa_version=number,
        )
        return out

    _compare("FlashAttention", shape, cache, case, run())
    return f"FlashAttention {number}", run


def dense_peers(shape: Shape, tokens: int, rows: int) -> dict[str, Callable[[], Tensor]]:
    """Attention over dense keys and values of one layer, by everybody who is installed."""
    options = {"device": shape.device, "dtype": shape.dtype}
    query = torch.randn(rows, shape.query_heads, 1, shape.head_size, **options)
    keys, values = (torch.randn(rows, shape.kv_heads, tokens, shape.head_size, **options) for _ in range(2))
    peers = {"torch SDPA": lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True)}
    if shape.device.type == "cuda" and find_spec("xformers") is not None:
        from xformers.ops import memory_efficient_attention

        group = shape.query_heads // shape.kv_heads
        grouped = query.view(rows, 1, shape.kv_heads, group, shape.head_size)
        spread = [t.transpose(1, 2).unsqueeze(3).expand(-1, -1, -1, group, -1) for t in (keys, values)]
        peers["xformers"] = lambda: memory_efficient_attention(grouped, *spread)
    return peers


def _compare(name: str, shape: Shape, cache: Cache, case: Case, answer: Tensor) -> None:
    """End the run if the answers to the first or the last row are wrong."""
    rows = len(case.lens)
    for row in {0, rows - 1}:
        difference = float((answer[row].float() - case.written_out(shape, cache, row)).abs().max())
        if not difference <= TOLERANCE[shape.dtype]:
            raise SystemExit(f"{name}: wrong at {int(case.lens[0])} tokens, {rows} rows: off by {difference}")


def _paged_rows(
    shape: Shape, tokens: int, rows: int, ratios: list[float], segments: list[int], measure: Callable[..., None]
) -> None:
    """Measure what reads the cache, in both layouts."""
    elements = blocks_for(tokens, rows, shape) * shape.block_bytes // shape.dtype.itemsize
    buffer = torch.empty(elements, dtype=shape.dtype, device=shape.device)
    buffer.normal_(generator=torch.Generator(shape.device).manual_seed(0))
    for layout in LAYOUTS:
        cache = Cache.make(shape, layout, buffer)
        for ratio, chain in [(r, s) for r in ratios for s in (segments if r < 1 else [0])]:
            case, name = Case.make(shape, tokens, rows, ratio, chain), f"paged_attention, keep {ratio:g}"
            name += f", {chain} segments" if chain > 1 else ""
            plan = case.planned(cache)
            _compare(name, shape, cache, case, case.attend(shape, cache, plan))
            what = {"layout": layout, "keep_ratio": ratio, "segments": chain}
            attend = partial(case.attend, shape, cache, plan)
            measure(name, attend, case.entries, **what)
            measure(f"the plan of all layers, {name}", partial(case.planned, cache), 0, **what)
        if (flash := flash_attention(shape, cache, tokens, rows)) is not None:
            measure(*flash, tokens, layout=layout)


def attention_rows(
    shape: Shape, tokens: int, rows: int, ratios: list[float], segments: list[int], copy: float
) -> list[dict[str, Any]]:
    """Every layout, keep ratio and number of segments beside the peers, which read everything."""
    results: list[dict[str, Any]] = []

    def measure(name: str, run: Callable[[], Any], entries: int, **what: Any) -> None:
        seconds = milliseconds(run, shape.device, recorded=True) / 1e3
        of_copy = rows * entries * shape.entry_bytes / seconds / copy
        same = {"tokens": tokens, "batch": rows, "layers": shape.layers, "system": name}
        results.append(same | {"layout": None, "keep_ratio": None, "segments": None} | what)
        results[-1] |= {"seconds": seconds, "of_copy": of_copy}

    _paged_rows(shape, tokens, rows, ratios, segments, measure)  # whose cache is gone when the dense peers come
    try:
        for name, run in dense_peers(shape, tokens, rows).items():
            measure(name, run, tokens)
    except torch.OutOfMemoryError as error:  # a copy for each query head
        console.print(f"{tokens} tokens, {rows} rows, dense: {error}")
    return results


def loss_row(device: torch.device, batch: int, queries: int, entries: int, head_size: int) -> dict[str, Any]:
    """The loss and its gradient in the keys: our kernel, and autograd through the formula."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q, keys, values = (
        normal(batch, queries, head_size) * head_size**-0.5,
        *(normal(batch, entries, head_size) for _ in range(2)),
    )
    mass = torch.rand(batch, queries, generator=generator, device=device) * entries
    shift = torch.full((batch, queries), math.log(2.0 * entries), device=device)
    mass = mass / (2 * entries)
    arguments = [q, shift, normal(batch, queries, head_size) * 0.3, mass, mass[..., None] * normal(*q.shape)]
    arguments += [torch.ones(batch, device=device)]
    sizes = torch.full((batch,), entries, device=device)

    def by_autograd() -> tuple[Tensor, Tensor]:
        leaf = keys.detach().requires_grad_()
        loss, _ = attention_loss_twin(*arguments, leaf, values, sizes, 1.0)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    ours, wanted = attention_loss(*arguments, keys, values, sizes), by_autograd()
    for name, got, right in zip(("loss", "gradient"), ours, wanted, strict=True):
        difference = float((got - right).abs().max() / right.abs().max())
        if not difference <= 5e-3:  # TF32 products on a GPU
            raise SystemExit(f"attention_loss: {name} off by {difference:.2g} of its largest")
    kernel = milliseconds(lambda: attention_loss(*arguments, keys, values, sizes), device) / 1e3
    flops = 2 * batch * queries * entries * head_size * 5  # forward q·k, p·v; backward q·k, a·v, and the gradient
    return {
        "batch": batch,
        "queries": queries,
        "entries": entries,
        "seconds": kernel,
        "autograd_seconds": milliseconds(by_autograd, device) / 1e3,
        "flop_per_second": flops / kernel,
    }


TARGETS = {
    "times faster than FlashAttention at keep 0.3": 2.5,
    "share of a copy's bandwidth at keep 0.3": 0.8,
    "times faster than FlashAttention at keep 1": 0.9,
}
"""What decoding 16 rows of 32,768 tokens is to come to on an H100, at least."""


def verdicts(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """What the targets speak of, in each layout: None where it was not measured."""

    def one(layout: str, name: str) -> dict[str, Any] | None:
        found = [row for row in rows if (row["tokens"], row["batch"], row["layout"]) == (32768, 16, layout)]
        return next((row for row in found if row["system"].startswith(name)), None)

    result: dict[str, dict[str, float | None]] = {}
    for layout in LAYOUTS:
        flash = one(layout, "FlashAttention")
        packed, whole = (one(layout, f"paged_attention, keep {keep}") for keep in ("0.3", "1"))
        figures = (
            flash["seconds"] / packed["seconds"] if flash and packed else None,
            packed["of_copy"] if packed else None,
            flash["seconds"] / whole["seconds"] if flash and whole else None,
        )
        result[layout] = dict(zip(TARGETS, figures, strict=True))
    return result


def fitting_layers(shape: Shape, tokens: int, rows: int) -> int:
    """The layers whose cache a GPU's free memory holds."""
    free = torch.cuda.mem_get_info()[0] - SPARE_BYTES
    return max(0, min(shape.layers, free // (blocks_for(tokens, rows, shape) * shape.block_size * shape.entry_bytes)))


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="May be given several times.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="May be given several times.")] = None,
    keep_ratio: Annotated[list[float], typer.Option(help="May be given several times.")] = [1.0, 0.5, 0.3, 0.1],  # noqa: B006
    segments: Annotated[list[int], typer.Option(help="In a row. May be given several times.")] = [1, 8],  # noqa: B006
    layers: Annotated[int | None, typer.Option(help="Of the model, whose cache holds them all.")] = None,
    query_heads: int = 32,
    kv_heads: int = 8,
    head_size: int = 128,
    block_size: int = 16,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Check, then time."""
    gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    if not gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("there is no GPU here: set TRITON_INTERPRET=1 to check the kernels at small sizes")
    device = torch.device("cuda" if gpu else "cpu")
    tokens = tokens or ([2048, 8192, 32768, 131072] if gpu else [256])
    batch = batch or ([1, 4, 16, 64] if gpu else [2])
    dtype = torch.bfloat16 if gpu else torch.float32
    shape = Shape(layers or (32 if gpu else 2), query_heads, kv_heads, head_size, block_size, dtype, device)
    copy = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    for count, size in track([(c, s) for c in tokens for s in batch], "attention", console=console):
        fitting = shape
        if gpu:
            torch.cuda.empty_cache()
            fitting = replace(shape, layers=fitting_layers(shape, count, size))
        if fitting.layers < shape.layers:
            console.print(f"{count} tokens, {size} rows: the memory holds {fitting.layers} of {shape.layers} layers")
        if fitting.layers:
            rows += attention_rows(fitting, count, size, keep_ratio, segments, copy)
    losses = [
        loss_row(device, *sizes, head_size)
        for sizes in ([(56, 1500, 600), (256, 1500, 600), (256, 3000, 2400)] if gpu else [(2, 96, 40)])
    ]
    name = torch.cuda.get_device_name() if gpu else "cpu, Triton's interpreter: times say nothing about a GPU"
    title = f"{query_heads} query heads, {kv_heads} KV heads of {head_size}, {str(shape.dtype)[6:]}, on {name}"
    table = Table("tokens", "batch", "layers", "layout", "", "ms", "of copy's bytes/s", title=title)
    for row in rows:
        cells = (row["tokens"], row["batch"], row["layers"], row["layout"] or "dense", row["system"])
        table.add_row(*map(str, cells), f"{row['seconds'] * 1e3:.3f}", f"{row['of_copy']:.2f}")
    out.print(table)
    table = Table("problems", "queries", "entries", "attention_loss ms", "autograd ms", "TFLOP/s")
    for row in losses:
        cells = row["batch"], row["queries"], row["entries"]
        times = row["seconds"] * 1e3, row["autograd_seconds"] * 1e3, row["flop_per_second"] / 1e12
        table.add_row(*map(str, cells), *(f"{value:.3g}" for value in times))
    out.print(table)
    targets = verdicts(rows if gpu else [])
    for layout, figures in targets.items():
        for what, value in figures.items():
            told = "not measured" if value is None else f"{value:.2f}"
            out.print(f"{layout}, {what}: {told} (target {TARGETS[what]})")
    line = {
        "benchmark": "kernels",
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": version("vllm") if find_spec("vllm") else None,
        "copy_bytes_per_second": copy,
        "attention": rows,
        "attention_loss": losses,
        "targets": targets,
    }
    if json_path is not None:
        json_path.write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    typer.run(main)
