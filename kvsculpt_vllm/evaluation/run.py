"""`kvsculpt eval`: all methods over all contexts, with progress, a table and a result file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from kvsculpt_vllm import models
from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.evaluation.harness import HEADS, Measurement, Trial
from kvsculpt_vllm.evaluation.methods import METHODS
from kvsculpt_vllm.evaluation.metrics import summarise
from kvsculpt_vllm.evaluation.model import EvaluationModel, load_tokenizer
from kvsculpt_vllm.evaluation.report import write_report
from kvsculpt_vllm.evaluation.results import Key, Results, Row, code_version
from kvsculpt_vllm.evaluation.texts import passages, read_text
from kvsculpt_vllm.sculpt.effort import EFFORTS

BUDGETS = ("uniform", "adaptive")

COLUMNS = {
    "kept_fraction": ("kept\nfraction", "{:.3f}"),
    "kl_mean": ("kl\nmean", "{:.4f}"),
    "kl_median": ("kl\nmedian", "{:.4f}"),
    "kl_p99": ("kl\np99", "{:.3f}"),
    "top1_agreement": ("top1\nagreement", "{:.3f}"),
    "ppl_full": ("ppl\nfull", "{:.2f}"),
    "ppl": ("\nppl", "{:.2f}"),
    "held_out_error_before": ("held-out error\nbefore", "{:.4f}"),
    "held_out_error_after": ("\nafter", "{:.4f}"),
    "seconds": ("\nseconds", "{:.1f}"),
}
"""The numbers of a row, as the table shows them: heading and format."""

TABLE_WIDTH = 130
"""A narrower terminal wraps the table's lines; cutting numbers off would be worse."""


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    model: str
    text: str
    context: int
    continuation: int
    num_contexts: int
    keep_ratios: Sequence[float]
    methods: Sequence[str]
    budgets: Sequence[str]
    effort: str
    block_size: int
    seed: int
    device: str

    def check(self) -> None:
        """Raises ValueError, naming the option, for what no measurement could be made of."""
        for option, given, allowed in (
            ("--methods", self.methods, METHODS),
            ("--budget", self.budgets, BUDGETS),
            ("--effort", [self.effort], EFFORTS),
        ):
            unknown = [name for name in given if name not in allowed]
            if unknown or not given:
                raise ValueError(f"{option}: got {', '.join(unknown) or 'nothing'}, allowed: {', '.join(allowed)}")
        for ratio in self.keep_ratios:
            if not 0 < ratio <= 1:
                raise ValueError(f"--keep-ratio: got {ratio}, allowed: a number > 0 and <= 1")

    @property
    def keys(self) -> list[Key]:
        """The rows, in the order of the table; what is named twice counts once."""
        return list(
            dict.fromkeys(
                (method, budget, ratio)
                for ratio in self.keep_ratios
                for budget in self.budgets
                for method in self.methods
            )
        )


def run(request: Request, json_path: Path | None, console: Console, report: Path | None = None) -> list[Row]:
    """Measure what is not yet in `json_path`, print all rows that were asked for, and write a report of them.

    Raises:
        ValueError, OSError, NotImplementedError, models.ModelError: what cannot be done, in words for the user.
    """
    request.check()
    transformers_logging.disable_progress_bar()
    directory = models.prepare(request.model) if request.model in models.MODELS else Path(request.model)
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"--model: {request.model} is neither a model's directory nor one of {', '.join(models.MODELS)}"
        )
    text = read_text(request.text)
    tokenizer, prefix = load_tokenizer(directory)
    chosen = passages(
        tokenizer(text, add_special_tokens=False, verbose=False).input_ids,
        request.context,
        request.continuation,
        request.num_contexts,
        request.seed,
        prefix,
    )
    exact = CompressionConfig()
    settings = {
        "model": directory.name,
        "text": Path(request.text).name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest()[:12],
        "context": request.context,
        "continuation": request.continuation,
        "num_contexts": request.num_contexts,
        "effort": request.effort,
        "block_size": request.block_size,
        "window": exact.window,
        "sink": exact.sink,
        "seed": request.seed,
        "device": torch.device(request.device).type,
        "code": code_version(),
    }
    results = Results(json_path, settings, request.num_contexts)
    work = [[key for key in request.keys if i in results.missing(key)] for i in range(len(chosen))]
    if any(work):
        model = EvaluationModel.load(directory, request.device)
        with _progress(console) as progress:
            bar = progress.add_task("", total=sum(map(len, work)))
            for i, (passage, keys) in enumerate(zip(chosen, work, strict=True)):
                place = f"context {i + 1} of {len(chosen)}"
                if not keys:
                    continue
                progress.update(bar, description=f"{place}: the full cache")
                trial = Trial(model, passage, EFFORTS[request.effort], request.block_size, exact.window, exact.sink)
                for method, budget in dict.fromkeys(key[:2] for key in keys):
                    ratios = [key[2] for key in keys if key[:2] == (method, budget)]
                    progress.update(bar, description=f"{place}: {method}, {budget}")
                    measurements = trial.measure(METHODS[method], budget, ratios)
                    for ratio, measurement in zip(ratios, measurements, strict=True):
                        results.add((method, budget, ratio), i, measurement, _row_numbers)
                        progress.advance(bar)
    results.close(request.keys)
    rows = [row for key in request.keys if (row := results.row(key)) is not None]
    Console(file=console.file, width=max(console.width, TABLE_WIDTH)).print(table(rows))
    if report is not None:
        num_kv_heads = (
            AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config().num_key_value_heads
        )
        console.print(f"report: {write_report(report, rows, COLUMNS, num_kv_heads)}")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """The rows as a table; rows of one (keep ratio, budget) belong together."""
    result = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("keep\nratio", "\nbudget", "\nmethod"):
        result.add_column(heading, no_wrap=True)
    for heading, _ in COLUMNS.values():
        result.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        group = row["keep_ratio"], row["budget"]
        if previous not in (None, group):
            result.add_section()
        previous = group
        numbers = (form.format(row[name]) for name, (_, form) in COLUMNS.items())
        result.add_row(f"{row['keep_ratio']:g}", row["budget"], row["method"], *numbers)
    return result


def _row_numbers(measurements: Sequence[Measurement]) -> Row:
    means = {
        name: float(np.mean([getattr(measurement, name) for measurement in measurements]))
        for name in ("kept_fraction", "seconds", "held_out_error_before", "held_out_error_after")
    }
    numbers = means | summarise([measurement.scores for measurement in measurements])
    heads = {
        name: np.mean([measurement.heads[name] for measurement in measurements], axis=0).tolist() for name in HEADS
    }
    trace = np.mean([measurement.trace for measurement in measurements], axis=0).tolist()
    return {name: numbers[name] for name in (*COLUMNS, "kl_per_context")} | {"heads": heads, "trace": trace}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
