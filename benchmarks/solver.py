"""Sculpting a context against one problem at a time with torch.optim.LBFGS: `python benchmarks/solver.py --help`.

Both get the same context, the same budgets, the same queries and the same start (the entries that selection keeps).
The reference is KVSculpt (arXiv 2603.27819) as one would write it down: per KV head, autograd through a softmax over
compressed and retained entries, torch.optim.LBFGS with strong Wolfe line search on the keys, values by least squares
every 5 steps. It goes on until it is as good as ours, or to the paper's 100 steps. As good means: its loss on held-out
queries (the same for both, and what answers depend on) is no higher than ours; the moment at which its loss on training
queries is no higher is reported beside it, though that is not what ours minimises: it stops early and shrinks values.

With `--shape` the context is made of random numbers in the shape of a model whose weights are not needed: for seconds;
what they come to means nothing (nor does the reference's number of steps). It is then also compressed as an engine
compresses a segment, some layers at a time, with the budgets of the calibration that comes with the plugin for such a
model, if one does: `segment_seconds`. `--every 0` leaves the reference out. Prints a table and ends with one JSON line.
Timed in one run, nothing else should run beside it.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kvsculpt_vllm import calibration_file, models
from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.rank_shape import RankShape
from kvsculpt_vllm.engine.worker.working_memory import reserved
from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.model import EvaluationModel, load_tokenizer
from kvsculpt_vllm.evaluation.texts import passages, read_text
from kvsculpt_vllm.kernels.dispatch import VARIABLE
from kvsculpt_vllm.sculpt.budgets import PagePlan, span_sizes
from kvsculpt_vllm.sculpt.compress import compress, fit, fitted_rows
from kvsculpt_vllm.sculpt.effort import EFFORTS, Effort
from kvsculpt_vllm.sculpt.layerwise import compress_segment
from kvsculpt_vllm.sculpt.memory import work_with
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.queries import sample_positions
from kvsculpt_vllm.sculpt.segment_source import SegmentSource
from kvsculpt_vllm.sculpt.slices import at_once
from kvsculpt_vllm.sculpt.survey import survey

STEPS, REFIT_EVERY, RIDGE, BLOCK_SIZE = 100, 5, 1e-3, 32
LONGEST = 32_768  # tokens of a context


class Shape(NamedTuple):
    """What a context's problems look like, whatever the model."""

    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    calibration: str = ""  # the name of the one that comes with the plugin, if one does

    @property
    def rank(self) -> RankShape:
        """As a worker has it, in 16 bits."""
        return RankShape(self.layers, self.kv_heads, self.query_heads, self.head_size, element_bytes=2)


SHAPES = {
    "smollm2-135m": Shape(30, 9, 3, 64, "SmolLM2-135M-Instruct"),
    "qwen2.5-1.5b": Shape(28, 12, 2, 128, "Qwen2.5-Coder-1.5B-Instruct"),
    "llama-3.1-8b": Shape(32, 32, 8, 128),
    "tiny": Shape(2, 2, 1, 16),
}


@dataclass(frozen=True)
class Part:
    """One head on some of its queries: the loss written out, in float32."""

    queries: Tensor  # (Q, D), scaled
    retained_lse: Tensor  # (Q, 1)
    retained_out: Tensor  # (Q, D)
    out: Tensor  # (Q, D) of the full cache
    lse: Tensor  # (Q,)
    norm: float

    @classmethod
    def split(cls, problems: Problems, b: int) -> tuple[Part, Part]:
        """Head b on its training and on its held-out queries."""
        queries, lse = problems.queries[b].float() * problems.scale, problems.retained_lse[b, :, None].float()
        logits = torch.cat([queries @ problems.keys[b].float().T, lse], dim=1)
        weights, retained = logits.softmax(-1), problems.retained_out[b].float()
        out = weights[:, :-1] @ problems.values[b].float() + weights[:, -1:] * retained
        norm = float(out.square().sum(-1).mean())
        parts = (~problems.held_out, problems.held_out)
        return tuple(cls(queries[p], lse[p], retained[p], out[p], logits[p].logsumexp(-1), norm) for p in parts)

    def attend(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (Q, m + 1), the retained entries last, and log-sum-exp (Q,)."""
        logits = torch.cat([self.queries @ keys.T, self.retained_lse], dim=1)
        return logits.softmax(-1), logits.logsumexp(-1)

    def loss(self, keys: Tensor, values: Tensor) -> Tensor:
        """Relative output error plus squared log-sum-exp error."""
        weights, lse = self.attend(keys)
        out = weights[:, :-1] @ values + weights[:, -1:] * self.retained_out
        return (out - self.out).square().sum(-1).mean() / self.norm + (lse - self.lse).square().mean()


@dataclass
class Reached:
    """Seconds after which the reference was as good as ours, None for never; and what it had in the end."""

    training: float | None
    held_out: float | None
    seconds: float
    steps: int
    held_out_loss: float


def reference(train: Part, held_out: Part, keys: Tensor, values: Tensor, goals: tuple[float, float]) -> Reached:
    """Sculpt one head from `keys` and `values` until both losses are no higher than `goals`, or for 100 steps.

    Judging is not timed.
    """
    start, keys = values.float(), keys.float().clone().requires_grad_()

    def fit_values() -> Tensor:
        with torch.no_grad():
            weights, _ = train.attend(keys)
            weights, residual = weights[:, :-1], train.out - weights[:, -1:] * train.retained_out
            gram = weights.T @ weights
            gram.diagonal().add_(RIDGE * gram.diagonal().mean())
            return start + torch.linalg.solve(gram, weights.T @ (residual - weights @ start))

    optimizer = torch.optim.LBFGS([keys], lr=1, max_iter=REFIT_EVERY, history_size=10, line_search_fn="strong_wolfe")
    begin = now(keys.device.type)
    values = fit_values()
    result = Reached(None, None, now(keys.device.type) - begin, 0, torch.inf)
    while True:
        losses = [float(part.loss(keys.detach(), values)) for part in (train, held_out)]
        result.held_out_loss = min(result.held_out_loss, losses[1])
        if losses[0] <= goals[0] and result.training is None:
            result.training = result.seconds
        if losses[1] <= goals[1] and result.held_out is None:
            result.held_out = result.seconds
        if result.steps >= STEPS or (result.training is not None and result.held_out is not None):
            return result

        def closure(values: Tensor = values) -> Tensor:
            optimizer.zero_grad()
            loss = train.loss(keys, values)
            loss.backward()
            return loss

        begin = now(keys.device.type)
        optimizer.step(closure)
        values = fit_values()
        result.seconds += now(keys.device.type) - begin
        result.steps += REFIT_EVERY


def random_context(shape: Shape, tokens: int, span_tokens: int, effort: Effort, device: str) -> SegmentSource:
    """A context of random queries, keys and values in bfloat16; logits spread by about 2, as is usual."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float32).bfloat16().to(device)

    count = effort.positions_for(2 * shape.layers * shape.query_heads * shape.head_size)
    positions, recent = sample_positions(0, tokens, count)
    pairs = (shape.layers * shape.kv_heads, tokens, shape.head_size)
    return SegmentSource(
        queries=2 * normal(shape.layers, len(positions), shape.query_heads, shape.head_size),
        positions=positions,
        recent=recent,
        keys=normal(*pairs),
        values=normal(*pairs),
        span=span_tokens,
        sinks=CompressionConfig().sink,
        rotaries=[None] * shape.layers,
        scale=shape.head_size**-0.5,
    )


def segment_seconds(source: SegmentSource, plan: PagePlan, effort: Effort, shape: Shape, runs: int) -> list[float]:
    """Seconds of each of some runs of what an engine does for a segment between reading its pages and writing them,
    after a run that compiles.
    """
    curves = None
    if shape.calibration:
        curves = calibration_file.read(calibration_file.SHIPPED / f"{shape.calibration}.json").whole
    seconds = []
    for _ in range(runs + 1):
        begin = now(source.device.type)
        compress_segment(source, plan, "sculpt", "adaptive", effort, lambda *_: None, calibration=curves)
        seconds.append(now(source.device.type) - begin)
    return seconds[1:]


def now(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def products(work: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products in `work`, which runs on the kernels' torch twins for it."""
    before = os.environ.get(VARIABLE, "")
    os.environ[VARIABLE] = "torch"
    try:
        with FlopCounterMode(display=False) as counter:
            work()
    finally:
        os.environ[VARIABLE] = before
    return counter.get_total_flops()


def main(
    model: Annotated[str, typer.Option(help="As for kvsculpt eval.")] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="As for kvsculpt eval.")] = "pydoc",
    shape: Annotated[
        str | None, typer.Option(help=f"Random numbers instead of a model and a text: {', '.join(SHAPES)}.")
    ] = None,
    context: Annotated[int, typer.Option(min=256, help="Tokens.")] = 2048,
    keep_ratio: Annotated[float, typer.Option(help="Fraction kept.")] = 0.3,
    effort: Annotated[str, typer.Option(help="fast, balanced or thorough.")] = "balanced",
    every: Annotated[
        int,
        typer.Option(min=0, help="The reference takes every so many-th head; the rest is scaled. 0: it takes none."),
    ] = 6,
    runs: Annotated[int, typer.Option(min=1, help="Of --shape's segment, as an engine makes it.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="A file for the JSON line, too.")] = None,
) -> None:
    """Time a whole context and compare."""
    if shape is not None and shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} given, allowed are {', '.join(SHAPES)}", param_hint="--shape")
    amount, exact = EFFORTS[effort], CompressionConfig()
    span_blocks, packed_blocks = span_sizes(context, exact.window, BLOCK_SIZE, keep_ratio)
    if packed_blocks >= span_blocks:
        raise typer.BadParameter(
            f"nothing would be compressed: {packed_blocks} blocks would stand for {span_blocks}",
            param_hint="--context, --keep-ratio",
        )
    if shape is not None:
        name, origin = shape, "random numbers"
        rank = SHAPES[shape].rank
        sizes = reserved(rank, exact.for_model(rank.query_numbers), LONGEST).sizes  # as a worker would
        if device == "cuda":
            work_with("cuda", *sizes)
        with torch.no_grad():
            source = random_context(SHAPES[shape], context, span_blocks * BLOCK_SIZE, amount, device)
            problems = at_once(source.of)(range(source.num_problems))
    else:
        directory = models.prepare(model) if model in models.MODELS else Path(model)
        name, origin = directory.name, Path(text).name
        tokenizer, prefix = load_tokenizer(directory)
        tokens = tokenizer(read_text(text), add_special_tokens=False, verbose=False).input_ids
        (passage,) = passages(tokens, context, 1, 1, 0, prefix)
        loaded = EvaluationModel.load(directory, device)
        problems = Context(loaded, passage.context, 1, amount, BLOCK_SIZE, exact.window, exact.sink).problems
    plan = PagePlan(BLOCK_SIZE, span_blocks, packed_blocks * problems.num_problems, exact.sink)
    with torch.no_grad():
        operations = products(lambda: compress(problems, plan, "sculpt", "adaptive", amount))  # warms caches, too
        if device == "cuda":
            compress(problems, plan, "sculpt", "adaptive", amount)  # compiles the kernels
            torch.cuda.reset_peak_memory_stats()
        begin = now(device)
        found = survey(problems, plan, "sculpt", "adaptive", amount)
        surveyed = now(device) - begin
        begin = now(device)
        ours = fit(problems, plan, found, "sculpt", amount)
        fitted = now(device) - begin
    on_device = torch.cuda.max_memory_allocated() if device == "cuda" else None
    peak = on_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    segment, segment_peak = None, None
    if shape is not None:
        begin_bytes = torch.cuda.memory_allocated() if device == "cuda" else 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            segment = segment_seconds(source, plan, amount, SHAPES[shape], runs)
        if device == "cuda":
            segment_peak = torch.cuda.max_memory_allocated() - begin_bytes
    heads = range(0, problems.num_problems, every) if every else ()
    sample = [b for b in heads if len(ours.keys[b]) < problems.num_entries]
    fitted_heads = sum(len(keys) < problems.num_entries for keys in ours.keys)
    table = Table(title=f"{name}, {context} tokens of {origin}, keep {keep_ratio:g}, {effort}, {device}")
    for heading in ("head", "entries", "our held-out loss", "reference's best", "steps", "s", "s to our training loss"):
        table.add_column(heading, justify="right")
    rows = problems.with_rows(fitted_rows(problems, amount))
    runs_of_reference = []
    for b in sample:
        parts = Part.split(rows, b)
        goals = tuple(float(part.loss(ours.keys[b].float(), ours.values[b].float())) for part in parts)
        kept = found.ranking.order[b, : len(ours.keys[b])]
        runs_of_reference.append(reference(*parts, problems.keys[b, kept], problems.values[b, kept], goals))
        run = runs_of_reference[-1]
        training = "never" if run.training is None else f"{run.training:.2f}"
        table.add_row(
            *(str(b), str(len(kept)), f"{goals[1]:.5f}", f"{run.held_out_loss:.5f}", str(run.steps)),
            *(f"{run.seconds if run.held_out is None else run.held_out:.2f}", training),
        )

    def all_heads(seconds: Sequence[float]) -> float:
        return sum(seconds) / len(seconds) * fitted_heads

    out = Console(width=120)
    out.print(
        f"ours: {surveyed:.2f} s for ranking and budgets, {fitted:.2f} s for the fit of {fitted_heads} heads; "
        f"{operations / (surveyed + fitted) / 1e9:.0f} GFLOP/s in matrix products.",
        f"peak memory{'' if on_device else ' of the whole process'}: {peak / 2**30:.2f} GiB.",
        sep="\n",
    )
    if segment is not None:
        told = ", ".join(f"{seconds:.3f}" for seconds in segment)
        out.print(f"a segment as an engine makes it: {told} s, median {median(segment):.3f} s.")
    compared: dict[str, object] = {}
    if runs_of_reference:
        held_out = all_heads([run.seconds if run.held_out is None else run.held_out for run in runs_of_reference])
        training = all_heads([run.seconds if run.training is None else run.training for run in runs_of_reference])
        parts = ("held_out", "training")
        reached = {name: sum(getattr(run, name) is not None for run in runs_of_reference) for name in parts}
        out.print(table)
        out.print(
            f"reference, fit alone, from {len(runs_of_reference)} heads: {held_out:.0f} s until its held-out loss is "
            f"no higher or its {STEPS} steps are over ({reached['held_out']} heads get there),",
            f"{training:.0f} s until its training loss is no higher ({reached['training']} heads).",
            sep="\n",
        )
        compared = {
            "reference_heads": len(runs_of_reference),
            "reference_fit_seconds": {"held_out": round(held_out, 1), "training": round(training, 1)},
            "reference_reached": reached,
            "fit_ratio": {"held_out": round(held_out / fitted, 1), "training": round(training / fitted, 1)},
            "whole_ratio": {
                name: round((surveyed + seconds) / (surveyed + fitted), 1)
                for name, seconds in (("held_out", held_out), ("training", training))
            },
        }
    line = {
        "benchmark": "solver",
        "model": name,
        "source": origin,
        "context": context,
        "keep_ratio": keep_ratio,
        "effort": effort,
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "survey_seconds": round(surveyed, 4),
        "fit_seconds": round(fitted, 4),
        "seconds": round(surveyed + fitted, 4),
        "products_flop": operations,
        "flop_per_second": round(operations / (surveyed + fitted)),
        "peak_bytes": peak,
        "segment_seconds": None if segment is None else round(median(segment), 4),
        "segment_peak_bytes": segment_peak,
        "segment_runs": None if segment is None else [round(seconds, 4) for seconds in segment],
        **compared,
    }
    if json_path is not None:
        json_path.write_text(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    typer.run(main)
