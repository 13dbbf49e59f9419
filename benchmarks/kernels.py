"""`paged_attention` against dense attention over the uncompressed cache, `attention_loss` against autograd.

    python benchmarks/kernels.py                      # on a GPU: one layer of Llama-3.1-8B's shape
    TRITON_INTERPRET=1 python benchmarks/kernels.py   # without one: small sizes, correctness only, no speed is claimed

Every case is first checked against attention over the same entries written out in torch. Attention that decodes reads
each entry once, so that its speed of light is memory: bytes a second are given beside those of a copy measured in the
same run. Prints tables with device and versions and ends with one JSON line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
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

from kvsculpt_vllm.kernels.attention_loss import attention_loss, attention_loss_twin
from kvsculpt_vllm.kernels.paged_attention import Prefixes, paged_attention, parts_for
from kvsculpt_vllm.kernels.pages import Pages

WINDOW = 64  # prompt tokens that stay exact, as by default
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

console = Console(stderr=True)
out = Console(width=140)


@dataclass(frozen=True)
class Shape:
    """One layer's attention."""

    query_heads: int
    kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def entry_bytes(self) -> int:
        """Key and value of one entry, all KV heads."""
        return 2 * self.kv_heads * self.head_size * self.dtype.itemsize


@dataclass
class Case:
    """A decoding batch whose rows begin with a chain of segments; heads with unequal budgets, as adaptive ones are."""

    query: Tensor  # (rows, heads, D)
    pages: Pages
    prefixes: Prefixes
    block_table: Tensor
    starts: Tensor
    lens: Tensor
    entries: int  # of a row and KV head, mean

    @classmethod
    def make(cls, shape: Shape, tokens: int, rows: int, keep_ratio: float, segments: int) -> Case:
        """Keep ratio 1 is a batch that nothing was compressed of: empty chains."""
        size, heads = shape.block_size, shape.kv_heads
        blocks = math.ceil(tokens / size)
        span = 0 if keep_ratio == 1 else (tokens - WINDOW) // size
        spans = [span // segments + (i < span % segments) for i in range(segments)] if span else []
        packed = [math.ceil(keep_ratio * blocks) for blocks in spans]
        own = sum(packed) + blocks - span
        ids = (torch.randperm(rows * own) + 1).view(rows, own).int()  # block 0 is the null block
        table = torch.zeros(rows, blocks, dtype=torch.int32)
        lengths = torch.tensor(packed, dtype=torch.int64)[:, None].repeat(1, heads)
        slots = torch.zeros(rows * own + 1, dtype=torch.int64)
        column = taken = 0
        for i, (stands_for, pages) in enumerate(zip(spans, packed, strict=True)):
            table[:, column : column + pages] = ids[:, taken : taken + pages]
            slots[table[:, column].long()] = torch.arange(rows) * len(spans) + i + 1
            # Of each pair of heads one gets half as much more, the other half less.
            more = min(pages // 2 if heads > 1 else 0, stands_for - pages)
            lengths[i, 0 : heads // 2 * 2 : 2] += more
            lengths[i, 1 : heads // 2 * 2 : 2] -= more
            column, taken = column + stands_for, taken + pages
        table[:, span:] = ids[:, taken:]

        def by_slot(of_segments: Tensor) -> Tensor:
            """Every row's segments have the same; slot 0 has zeros."""
            return torch.cat([of_segments.new_zeros(1, *of_segments.shape[1:]), *[of_segments] * rows])

        prefixes = Prefixes(
            slots,
            by_slot((lengths.cumsum(1) - lengths)[:, None]),
            by_slot(lengths[:, None]),
            by_slot(torch.tensor(spans, dtype=torch.int64)),
        )
        generator = torch.Generator(shape.device).manual_seed(0)
        options = {"generator": generator, "device": shape.device, "dtype": shape.dtype}
        buffer = torch.randn((rows * own + 1) * heads, size * 2 * shape.head_size, **options)
        device = shape.device
        return cls(
            torch.randn(rows, shape.query_heads, shape.head_size, **options),
            Pages(buffer, torch.arange(heads, device=device), heads, size, 2 * shape.head_size, shape.head_size),
            Prefixes(*(tensor.to(device) for tensor in prefixes)),
            table.to(device),
            torch.arange(rows + 1, dtype=torch.int32, device=device),
            torch.full((rows,), tokens, dtype=torch.int32, device=device),
            tokens - (span - sum(packed)) * size,
        )

    def attend(self, shape: Shape) -> Tensor:
        """Our kernel, split as the backend splits it."""
        result = torch.empty_like(self.query)
        rows = len(self.lens)
        processors = torch.cuda.get_device_properties(0).multi_processor_count if self.query.is_cuda else 4
        parts = parts_for(rows * shape.kv_heads, processors)
        scale = shape.head_size**-0.5
        tensors = self.block_table, self.starts, self.lens
        paged_attention(
            self.query, result, self.pages, self.prefixes, *tensors, 0, shape.kv_heads, scale, 1, num_parts=parts
        )
        return result

    def written_out(self, shape: Shape, row: int) -> Tensor:
        """The row's answer (heads, D) from the entries taken one page list at a time, in float32."""
        size, group, answers = shape.block_size, shape.query_heads // shape.kv_heads, []
        table, length = self.block_table[row].long(), int(self.lens[row])
        for head in range(shape.kv_heads):
            column, pages = 0, []
            while slot := int(self.prefixes.slot_of_block[table[column]]):
                start, count = (int(t[slot, 0, head]) for t in (self.prefixes.starts, self.prefixes.lengths))
                cells = start + torch.arange(count, device=table.device)
                blocks = table[column + cells // shape.kv_heads]
                pages.append(blocks * shape.kv_heads + cells % shape.kv_heads)
                column += int(self.prefixes.span_blocks[slot])
            packed = sum(map(len, pages))
            index = torch.cat([*pages, table[column:] * shape.kv_heads + head])
            entries = self.pages.buffer[index].view(len(index) * size, 2, shape.head_size)
            entries = entries[: packed * size + length - column * size].float()
            asked = self.query[row, head * group : (head + 1) * group].float()
            weights = (asked @ entries[:, 0].T * shape.head_size**-0.5).softmax(-1)
            answers.append(weights @ entries[:, 1])
        return torch.cat(answers)


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median; on a GPU with its L2 cache emptied before each run."""
    if device.type == "cuda":
        return triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median")
    from torch.utils.benchmark import Timer

    return Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=0.05).median * 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    count = 1 << (30 if device.type == "cuda" else 24)
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / (milliseconds(lambda: target.copy_(source), device) / 1e3)


def dense_peers(shape: Shape, tokens: int, rows: int) -> dict[str, Callable[[], Tensor]]:
    """Attention over the whole cache, by everybody who is installed."""
    options = {"device": shape.device, "dtype": shape.dtype}
    query = torch.randn(rows, shape.query_heads, 1, shape.head_size, **options)
    keys, values = (torch.randn(rows, shape.kv_heads, tokens, shape.head_size, **options) for _ in range(2))
    peers = {"torch SDPA": lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True)}
    if shape.device.type != "cuda":
        return peers
    if find_spec("vllm") is not None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        blocks = math.ceil(tokens / shape.block_size)
        paged = (rows * blocks, shape.block_size, shape.kv_heads, shape.head_size)
        paged_keys, paged_values = torch.randn(paged, **options), torch.randn(paged, **options)
        table = torch.randperm(rows * blocks, device=shape.device).view(rows, blocks).int()
        starts = torch.arange(rows + 1, dtype=torch.int32, device=shape.device)
        lens = torch.full((rows,), tokens, dtype=torch.int32, device=shape.device)
        peers["FlashAttention"] = lambda: flash_attn_varlen_func(
            q=query[:, :, 0],
            k=paged_keys,
            v=paged_values,
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=tokens,
            seqused_k=lens,
            block_table=table,
            causal=True,
        )
    if find_spec("xformers") is not None:
        from xformers.ops import memory_efficient_attention

        group = shape.query_heads // shape.kv_heads
        grouped = query.view(rows, 1, shape.kv_heads, group, shape.head_size)
        spread = [t.transpose(1, 2).unsqueeze(3).expand(-1, -1, -1, group, -1) for t in (keys, values)]
        peers["xformers"] = lambda: memory_efficient_attention(grouped, *spread)
    return peers


def attention_rows(
    shape: Shape, tokens: int, rows: int, ratios: list[float], segments: list[int], copy: float
) -> list[dict[str, Any]]:
    """Every keep ratio and number of segments beside the peers, which read everything."""
    results = []
    for ratio, chain in [(r, s) for r in ratios for s in (segments if r < 1 else [0])]:
        case, name = Case.make(shape, tokens, rows, ratio, chain), f"paged_attention, keep {ratio:g}"
        name += f", {chain} segments" if chain > 1 else ""
        answer = case.attend(shape)
        for row in {0, rows - 1}:
            difference = float((answer[row].float() - case.written_out(shape, row)).abs().max())
            if not difference <= TOLERANCE[shape.dtype]:
                raise SystemExit(f"{name}: wrong at {tokens} tokens, {rows} rows: off by {difference}")
        seconds = milliseconds(lambda case=case: case.attend(shape), shape.device) / 1e3
        read = rows * case.entries * shape.entry_bytes
        results.append(
            {
                "system": name,
                "keep_ratio": ratio,
                "segments": chain,
                "seconds": seconds,
                "of_copy": read / seconds / copy,
            }
        )
        del case, answer
    for name, run in dense_peers(shape, tokens, rows).items():
        seconds = milliseconds(run, shape.device) / 1e3
        of_copy = rows * tokens * shape.entry_bytes / seconds / copy
        results.append({"system": name, "keep_ratio": None, "segments": None, "seconds": seconds, "of_copy": of_copy})
    return [{"tokens": tokens, "batch": rows} | result for result in results]


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


def verdicts(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """What the targets speak of: None where it was not measured."""
    at = {(row["tokens"], row["batch"], row["system"]): row for row in rows}

    def ratio(tokens: int, batch: int, keep: float) -> float | None:
        ours, peer = (at.get((tokens, batch, name)) for name in (f"paged_attention, keep {keep:g}", "FlashAttention"))
        return peer["seconds"] / ours["seconds"] if ours and peer else None

    ours = at.get((32768, 16, "paged_attention, keep 0.3"))
    return {
        "keep 0.3, 32k, batch 16: times faster than FlashAttention (target 2.5)": ratio(32768, 16, 0.3),
        "keep 0.3, 32k, batch 16: share of copy bandwidth (target 0.8)": ours["of_copy"] if ours else None,
        "keep 1, 32k, batch 16: times faster than FlashAttention (target 0.9)": ratio(32768, 16, 1.0),
    }


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="May be given several times.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="May be given several times.")] = None,
    keep_ratio: Annotated[list[float], typer.Option(help="May be given several times.")] = [1.0, 0.5, 0.3, 0.1],  # noqa: B006
    segments: Annotated[list[int], typer.Option(help="In a row. May be given several times.")] = [1, 8],  # noqa: B006
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
    shape = Shape(query_heads, kv_heads, head_size, block_size, torch.bfloat16 if gpu else torch.float32, device)
    copy = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    for count, size in track([(c, s) for c in tokens for s in batch], "attention", console=console):
        # The full cache in the kernel's pages, and twice more for the peers.
        if gpu and 3.5 * count * size * shape.entry_bytes > torch.cuda.mem_get_info()[0]:
            console.print(f"{count} tokens, {size} rows: not enough memory")
            continue
        rows += attention_rows(shape, count, size, keep_ratio, segments, copy)
    losses = [
        loss_row(device, *sizes, head_size)
        for sizes in ([(56, 1500, 600), (256, 1500, 600), (256, 3000, 2400)] if gpu else [(2, 96, 40)])
    ]
    name = torch.cuda.get_device_name() if gpu else "cpu, Triton's interpreter: times say nothing about a GPU"
    title = f"{query_heads} query heads, {kv_heads} KV heads of {head_size}, {str(shape.dtype)[6:]}, on {name}"
    table = Table("tokens", "batch", "", "ms", "of copy's bytes/s", title=title)
    for row in rows:
        cells = row["tokens"], row["batch"], row["system"], f"{row['seconds'] * 1e3:.3f}", f"{row['of_copy']:.2f}"
        table.add_row(*map(str, cells))
    out.print(table)
    table = Table("problems", "queries", "entries", "attention_loss ms", "autograd ms", "TFLOP/s")
    for row in losses:
        cells = row["batch"], row["queries"], row["entries"]
        times = row["seconds"] * 1e3, row["autograd_seconds"] * 1e3, row["flop_per_second"] / 1e12
        table.add_row(*map(str, cells), *(f"{value:.3g}" for value in times))
    out.print(table)
    targets = verdicts(rows) if gpu else dict.fromkeys(verdicts([]))
    for what, value in targets.items():
        out.print(f"{what}: {'not measured' if value is None else f'{value:.2f}'}")
    line = {
        "benchmark": "kernels",
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
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
