"""`kvsculpt eval`: all methods over all contexts, with progress, a table and a result file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kvsculpt_vllm.calibration_file import AUTO, NONE, CalibrationFile, ModelShape, find, read
from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.evaluation.continuation import Measurement, Trial
from kvsculpt_vllm.evaluation.harness import ONE_SPAN, Context, is_one_span
from kvsculpt_vllm.evaluation.methods import METHODS, calibrated
from kvsculpt_vllm.evaluation.model import EvaluationModel, head_size_of, load_tokenizer, model_directory, query_numbers
from kvsculpt_vllm.evaluation.progress import progress_bar
from kvsculpt_vllm.evaluation.report import write_report
from kvsculpt_vllm.evaluation.results import Key, Measured, Results, Row, code_version, segment_of
from kvsculpt_vllm.evaluation.retrieval import Found, Retrieval
from kvsculpt_vllm.evaluation.tasks import GROUPS, TASKS
from kvsculpt_vllm.evaluation.tasks.question import LEAKAGE
from kvsculpt_vllm.evaluation.tasks.sample import Sample, samples
from kvsculpt_vllm.evaluation.texts import Passage, passages, read_text
from kvsculpt_vllm.layer_kinds import full_layers
from kvsculpt_vllm.sculpt.effort import EFFORTS
from kvsculpt_vllm.sculpt.survey import BUDGETS

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

TASK_COLUMNS = {
    "kept_fraction": ("kept\nfraction", "{:.3f}"),
    "score_full": ("score\nfull", "{:.3f}"),
    "score": ("\nscore", "{:.3f}"),
    "seconds": ("\nseconds", "{:.1f}"),
}
"""The same for a task."""

LEAKAGE_COLUMNS = {"leakage_full": ("leakage\nfull", "{:.3f}"), "leakage": ("\nleakage", "{:.3f}")}
"""And for one that tries for a secret."""

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
    segment: int | None  # tokens; `harness.ONE_SPAN` means all at once, None as many as a server would take
    seed: int
    device: str
    tasks: Sequence[str] = ()
    calibration: str = AUTO

    def check(self) -> None:
        """Check what the command line asked for.

        Raises:
            ValueError: names the option for which no measurement could be made.
        """
        for option, given, allowed in (
            ("--methods", self.methods, METHODS),
            ("--budget", self.budgets, BUDGETS),
            ("--effort", [self.effort], EFFORTS),
            ("--tasks", self.tasks, TASKS),
        ):
            unknown = [name for name in given if name not in allowed]
            if unknown or (not given and option != "--tasks"):
                groups = f"; several at once: {', '.join(GROUPS)}" if option == "--tasks" else ""
                raise ValueError(
                    f"{option}: got {', '.join(unknown) or 'nothing'}, allowed: {', '.join(allowed)}{groups}"
                )
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


@dataclass(frozen=True)
class Series:
    """What is measured under the same settings: the passages of a text, or the samples of a task."""

    settings: dict[str, Any]
    items: Sequence[Passage | Sample]
    kind: type[Measurement] | type[Found]
    columns: dict[str, tuple[str, str]]

    @property
    def name(self) -> str:
        """The task, or the text."""
        return self.settings.get("task", self.settings["text"])


def run(request: Request, json_path: Path | None, console: Console, report: Path | None = None) -> list[Row]:
    """Measure what is not yet in `json_path`, print all rows that were asked for, and write a report of them.

    Raises:
        ValueError, OSError, NotImplementedError, models.ModelError: what cannot be done, in words for the user.
    """
    request.check()
    transformers_logging.disable_progress_bar()
    directory = model_directory(request.model)
    tokenizer, prefix = load_tokenizer(directory)
    exact = CompressionConfig().for_model(query_numbers(_text_config(directory)))
    segment = exact.segment_tokens if request.segment is None else request.segment
    calibration = calibration_of(directory, request.calibration)
    methods = METHODS
    if calibration is not None:
        methods = METHODS | calibrated(calibration.whole)
    load_model = cache(lambda: EvaluationModel.load(directory, request.device))  # only if anything is missing
    rows = []
    for series in _series(request, directory.name, tokenizer, prefix, exact, segment, calibration):
        results = Results(json_path, series.settings, len(series.items), series.kind)
        work = [[key for key in request.keys if i in results.missing(key)] for i in range(len(series.items))]
        with progress_bar(console) as progress:
            bar = progress.add_task("", total=sum(map(len, work)))
            for i, (item, keys) in enumerate(zip(series.items, work, strict=True)):
                place = f"{series.name} {i + 1} of {len(series.items)}"
                if not keys:
                    continue
                progress.update(bar, description=f"{place}: the full cache")
                trial = _trial(load_model(), item, request, exact, tokenizer)
                for method, budget in dict.fromkeys(key[:2] for key in keys):
                    ratios = [key[2] for key in keys if key[:2] == (method, budget)]
                    progress.update(bar, description=f"{place}: {method}, {budget}")
                    measurements: Iterator[Measured] = trial.measure(
                        methods[method], budget, ratios, segment_of(method, segment)
                    )
                    for ratio, measured in zip(ratios, measurements, strict=True):
                        results.add((method, budget, ratio), i, measured)
                        progress.advance(bar)
        results.close(request.keys)
        own = [row for key in request.keys if (row := results.row(key)) is not None]
        Console(file=console.file, width=max(console.width, TABLE_WIDTH)).print(table(own, series))
        rows += own
    if report is not None:
        console.print(f"report: {write_report(report, rows, COLUMNS, _kv_heads(_text_config(directory)))}")
    return rows


def calibration_of(directory: Path, setting: str) -> CalibrationFile | None:
    """Read the calibration that the setting `--calibration` means for the model in `directory`, None if there is none.

    Raises:
        CalibrationError: the file that is meant does not fit the model.
    """
    config = _text_config(directory)
    kv_heads = _kv_heads(config)
    group = config.num_attention_heads // kv_heads
    path = find(setting, str(directory), ModelShape(len(full_layers(config)), kv_heads, group, head_size_of(config)))
    return None if path is None else read(path)


def _kv_heads(config: Any) -> int:
    """How many KV heads a layer has."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _text_config(directory: Path) -> Any:
    return AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()


def _series(
    request: Request,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    exact: CompressionConfig,
    segment: int,
    calibration: CalibrationFile | None,
) -> Iterator[Series]:
    text = read_text(request.text)
    one_span = is_one_span(request.context, exact.window, request.block_size, segment)
    settings = {
        "model": model,
        "text": Path(request.text).name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest()[:12],
        "context": request.context,
        "num_contexts": request.num_contexts,
        "effort": request.effort,
        "block_size": request.block_size,
        "segment": ONE_SPAN if one_span else segment,
        "window": exact.window,
        "sink": exact.sink,
        "seed": request.seed,
        "device": torch.device(request.device).type,
        "calibration": NONE if calibration is None else calibration.digest,
        "code": code_version(),
    }
    for task in request.tasks:
        make, count = TASKS[task], request.num_contexts
        hidden = samples(task, make, text, tokenizer, request.context, count, request.seed, prefix)
        secret = any(question.measures == LEAKAGE for question in hidden[0].questions)
        yield Series(settings | {"task": task}, hidden, Found, TASK_COLUMNS | (LEAKAGE_COLUMNS if secret else {}))
    if not request.tasks:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        chosen = passages(tokens, request.context, request.continuation, request.num_contexts, request.seed, prefix)
        yield Series(settings | {"continuation": request.continuation}, chosen, Measurement, COLUMNS)


def _trial(
    model: EvaluationModel,
    item: Passage | Sample,
    request: Request,
    exact: CompressionConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Trial | Retrieval:
    following = len(item.continuation) if isinstance(item, Passage) else item.following
    effort = EFFORTS[request.effort]
    context = Context(model, item.context, following, effort, request.block_size, exact.window, exact.sink)
    return Trial(context, item) if isinstance(item, Passage) else Retrieval(context, item, tokenizer)


def table(rows: Sequence[Row], series: Series) -> Table:
    """The rows as a table; rows of one (keep ratio, budget) belong together."""
    result = Table(box=None, header_style="bold", pad_edge=False, title=series.name)
    for heading in ("keep\nratio", "\nbudget", "\nmethod"):
        result.add_column(heading, no_wrap=True)
    for heading, _ in series.columns.values():
        result.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        group = row["keep_ratio"], row["budget"]
        if previous not in (None, group):
            result.add_section()
        previous = group
        numbers = (form.format(row[name]) for name, (_, form) in series.columns.items())
        result.add_row(f"{row['keep_ratio']:g}", row["budget"], row["method"], *numbers)
    return result
