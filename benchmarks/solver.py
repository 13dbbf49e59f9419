"""Sculpting a context against one problem at a time with torch.optim.LBFGS: `python benchmarks/solver.py --help`.

Both get the same context, the same budgets, the same queries and the same start (the entries that selection keeps).
The reference is KVSculpt (arXiv 2603.27819) as one would write it down: per KV head, autograd through a softmax over
compressed and retained entries, torch.optim.LBFGS with strong Wolfe line search on the keys, values by least squares
every 5 steps. It goes on until it is as good as ours, or to the paper's 100 steps. As good means: its loss on held-out
queries (the same for both, and what answers depend on) is no higher than ours; the moment at which its loss on training
queries is no higher is reported beside it, though that is not what ours minimises: it stops early and shrinks values.

Prints a table and ends with one JSON line. Timed in one run, alternating, nothing else should run beside it.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvsculpt_vllm import models
from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.model import EvaluationModel, load_tokenizer
from kvsculpt_vllm.evaluation.texts import passages, read_text
from kvsculpt_vllm.sculpt.compress import compress, fit
from kvsculpt_vllm.sculpt.effort import EFFORTS
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.survey import survey

STEPS, REFIT_EVERY, RIDGE = 100, 5, 1e-3


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
    begin = time.perf_counter()
    values = fit_values()
    result = Reached(None, None, time.perf_counter() - begin, 0, torch.inf)
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

        begin = time.perf_counter()
        optimizer.step(closure)
        values = fit_values()
        result.seconds += time.perf_counter() - begin
        result.steps += REFIT_EVERY


def main(
    model: Annotated[str, typer.Option(help="As for kvsculpt eval.")] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="As for kvsculpt eval.")] = "pydoc",
    context: Annotated[int, typer.Option(min=256, help="Tokens.")] = 2048,
    keep_ratio: Annotated[float, typer.Option(help="Fraction kept.")] = 0.3,
    effort: Annotated[str, typer.Option(help="fast, balanced or thorough.")] = "balanced",
    every: Annotated[
        int, typer.Option(min=1, help="The reference takes every so many-th head; the rest is scaled.")
    ] = 6,
) -> None:
    """Time a whole context and compare."""
    directory = models.prepare(model) if model in models.MODELS else Path(model)
    tokenizer, prefix = load_tokenizer(directory)
    tokens = tokenizer(read_text(text), add_special_tokens=False, verbose=False).input_ids
    (passage,) = passages(tokens, context, 1, 1, 0, prefix)
    exact, amount = CompressionConfig(), EFFORTS[effort]
    case = Context(EvaluationModel.load(directory, "cpu"), passage.context, 1, amount, 32, exact.window, exact.sink)
    problems, plan = case.problems, case.plan(keep_ratio)
    with torch.no_grad():
        compress(problems, plan, "select", "uniform", amount)  # warm caches and threads
        begin = time.perf_counter()
        found = survey(problems, plan, "sculpt", "adaptive", amount)
        surveyed = time.perf_counter() - begin
        begin = time.perf_counter()
        ours = fit(problems, plan, found, "sculpt", amount)
        fitted = time.perf_counter() - begin
    sample = [b for b in range(0, problems.num_problems, every) if len(ours.keys[b]) < problems.num_entries]
    fitted_heads = sum(len(keys) < problems.num_entries for keys in ours.keys)
    table = Table(title=f"{directory.name}, {context} tokens of {Path(text).name}, keep {keep_ratio:g}, {effort}")
    for heading in ("head", "entries", "our held-out loss", "reference's best", "steps", "s", "s to our training loss"):
        table.add_column(heading, justify="right")
    rows = problems.with_rows(problems.thin_rows(amount.fit_positions * problems.group))
    runs = []
    for b in sample:
        parts = Part.split(rows, b)
        goals = tuple(float(part.loss(ours.keys[b].float(), ours.values[b].float())) for part in parts)
        kept = found.ranking.order[b, : len(ours.keys[b])]
        runs.append(reference(*parts, problems.keys[b, kept], problems.values[b, kept], goals))
        run = runs[-1]
        training = "never" if run.training is None else f"{run.training:.2f}"
        table.add_row(
            *(str(b), str(len(kept)), f"{goals[1]:.5f}", f"{run.held_out_loss:.5f}", str(run.steps)),
            *(f"{run.seconds if run.held_out is None else run.held_out:.2f}", training),
        )

    def all_heads(seconds: Sequence[float]) -> float:
        return sum(seconds) / len(seconds) * fitted_heads

    held_out = all_heads([run.seconds if run.held_out is None else run.held_out for run in runs])
    training = all_heads([run.seconds if run.training is None else run.training for run in runs])
    out = Console(width=120)
    out.print(table)
    reached = {name: sum(getattr(run, name) is not None for run in runs) for name in ("held_out", "training")}
    out.print(
        f"ours: {surveyed:.1f} s for ranking and budgets, {fitted:.1f} s for the fit of {fitted_heads} heads.",
        f"reference, fit alone, from {len(runs)} heads: {held_out:.0f} s until its held-out loss is no higher or its "
        f"{STEPS} steps are over ({reached['held_out']} heads get there),",
        f"{training:.0f} s until its training loss is no higher ({reached['training']} heads).",
        sep="\n",
    )
    line = {
        "benchmark": "solver",
        "model": directory.name,
        "context": context,
        "keep_ratio": keep_ratio,
        "effort": effort,
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "survey_seconds": round(surveyed, 2),
        "fit_seconds": round(fitted, 2),
        "seconds": round(surveyed + fitted, 2),
        "reference_heads": len(runs),
        "reference_fit_seconds": {"held_out": round(held_out, 1), "training": round(training, 1)},
        "reference_reached": reached,
        "fit_ratio": {"held_out": round(held_out / fitted, 1), "training": round(training / fitted, 1)},
        "whole_ratio": {
            name: round((surveyed + seconds) / (surveyed + fitted), 1)
            for name, seconds in (("held_out", held_out), ("training", training))
        },
    }
    print(json.dumps(line))


if __name__ == "__main__":
    typer.run(main)
