"""Tables and a picture of the tasks: `python benchmarks/quality.py --help`.

Reads the result files of `kvsculpt eval --tasks` in one folder, prints the tables that docs/quality.md has
(docs/tables/ takes them from here), draws the scores against the keep ratio, and ends with one JSON line.

Intervals are Wilson's at 95 %. A sample is one trial however many questions it has, and a score between 0 and 1 a part
of a success. That is cautious: scores between 0 and 1 vary no more than those that are 0 or 1 with the same mean. And
unlike a bootstrap it does not call a task certain because 8 of 8 samples went well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import typer

from kvsculpt_vllm.evaluation.tasks import COPYING, RULER, TASKS

FOLDER = Path(__file__).parent / "results" / "tasks"
MIN_SAMPLES, KEEP_RATIO = 8, 0.3
Z = 1.959964
"""Of the normal distribution 95 % are within so many standard deviations."""

SCULPT = "sculpt"
FAMILIES = {
    "RULER": tuple(RULER),
    "many questions": ("many_questions",),
    "instructions": ("instructions",),
    "conversation": ("conversation",),
    "copying": tuple(COPYING),
}

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]  # heading, rows


class Setting(NamedTuple):
    """What rows must share to be compared."""

    model: str
    text: str
    context: int
    seed: int

    def __str__(self) -> str:
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.model.removesuffix('-Instruct')}, {self.context:,} tokens{seed}"


class Way(NamedTuple):
    """How a context was compressed, but for the ratio."""

    method: str
    budget: str
    calibrated: bool
    effort: str
    segment: int

    def __str__(self) -> str:
        budget = self.budget
        if self.method == SCULPT and budget == "adaptive":
            budget = "calibrated" if self.calibrated else "by a pilot"
        effort = "" if self.effort == "balanced" else f", {self.effort}"
        segment = f", segments of {self.segment:,}" if self.segment else ""
        return f"{self.method}, {budget}{effort}{segment}"


class Interval(NamedTuple):
    """A mean, and where the true one is in 95 of 100 cases."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Measured:
    """The rows of a folder that have enough samples."""

    def __init__(self, rows: Iterable[Row], min_samples: int = MIN_SAMPLES) -> None:
        self.rows = [row for row in rows if row["settings"]["num_contexts"] >= min_samples]
        self.settings = sorted({setting_of(row) for row in self.rows})
        self.ways = sorted({way_of(row) for row in self.rows}, key=lambda way: (way.method != SCULPT, way))

    def row(self, setting: Setting, task: str, way: Way, keep_ratio: float) -> Row | None:
        """The row with the most samples, if there is one."""
        wanted = setting, task, way, keep_ratio
        found = [
            row
            for row in self.rows
            if (setting_of(row), row["settings"]["task"], way_of(row), row["keep_ratio"]) == wanted
        ]
        return max(found, key=lambda row: row["settings"]["num_contexts"], default=None)

    def of_task(self, setting: Setting, task: str, keep_ratio: float) -> dict[Way, Row]:
        """The rows of a task by all ways, where they were measured on the same samples."""
        rows = {way: row for way in self.ways if (row := self.row(setting, task, way, keep_ratio)) is not None}
        most = max((row["settings"]["num_contexts"] for row in rows.values()), default=0)
        return {way: row for way, row in rows.items() if row["settings"]["num_contexts"] == most}


def setting_of(row: Row) -> Setting:
    """What a row was measured on."""
    settings = row["settings"]
    return Setting(*(settings[name] for name in Setting._fields))


def way_of(row: Row) -> Way:
    """How the contexts of a row were compressed."""
    settings = row["settings"]
    calibrated = settings["calibration"] != "none"
    return Way(row["method"], row["budget"], calibrated, settings["effort"], settings["segment"])


def read(folder: Path = FOLDER) -> list[Row]:
    """All rows of tasks in the result files of a folder; none if it is not there.

    Raises:
        ValueError: a file is not a result file, or from before the full cache's scores were kept by sample.
    """
    rows = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = [row for row in json.loads(path.read_text(encoding="utf-8")) if "task" in row["settings"]]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a result file of `kvsculpt eval`") from error
        if any("score_full_per_sample" not in row for row in found):
            raise ValueError(f"{path} is from before scores of the full cache were kept by sample: measure it anew")
        rows += found
    return rows


def wilson(scores: Sequence[float]) -> Interval:
    """The mean of scores between 0 and 1, and Wilson's interval at 95 % (E. B. Wilson, JASA 22, 1927)."""
    count, share = len(scores), mean(scores)
    spread = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    middle, scale = share + Z**2 / (2 * count), 1 + Z**2 / count
    return Interval(share, max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0))


def scores(measured: Measured, keep_ratio: float = KEEP_RATIO) -> Table:
    """Score of each task, from the full cache and by each way."""
    return _by_measure(measured, keep_ratio, "score")


def leakage(measured: Measured, keep_ratio: float = KEEP_RATIO) -> Table:
    """How often attempts at the secret of a system prompt reveal it."""
    return _by_measure(measured, keep_ratio, "leakage")


def _by_measure(measured: Measured, keep_ratio: float, measure: str) -> Table:
    body = []
    for setting in measured.settings:
        for task in TASKS:
            rows = measured.of_task(setting, task, keep_ratio)
            name = f"{measure}_per_sample"
            rows = {way: row for way, row in rows.items() if name in row}
            if rows:
                first = next(iter(rows.values()))
                cells = [str(wilson(rows[way][name])) if way in rows else "–" for way in measured.ways]
                samples = str(first["settings"]["num_contexts"])
                body.append([str(setting), task, samples, str(wilson(first[f"{measure}_full_per_sample"])), *cells])
    return [f"{measure}, keep {keep_ratio:g}", "task", "samples", "full cache", *map(str, measured.ways)], body


def wins(measured: Measured, keep_ratio: float = KEEP_RATIO) -> Table:
    """Samples that the first way of sculpt answers better, as well, and worse than another way or the full cache."""
    body = []
    for setting in measured.settings:
        ours = next((way for way in measured.ways if way.method == SCULPT), None)
        for other in [None, *(way for way in measured.ways if way != ours)]:
            cells, pairs = [], list[tuple[float, float]]()
            for tasks in FAMILIES.values():
                here = [pair for task in tasks for pair in _pairs(measured, setting, task, keep_ratio, ours, other)]
                pairs += here
                cells.append(_counted(here))
            if pairs:
                won, lost = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
                share = str(wilson([1.0] * won + [0.0] * lost)) if won + lost else "–"
                name = "full cache" if other is None else str(other)
                body.append([str(setting), f"{ours} / {name}", *cells, _counted(pairs), share])
    heading = [f"better / equal / worse, keep {keep_ratio:g}", "of", *FAMILIES, "all", "better, where they differ"]
    return heading, body


def _pairs(
    measured: Measured, setting: Setting, task: str, keep_ratio: float, ours: Way | None, other: Way | None
) -> list[tuple[float, float]]:
    """The scores of both on each sample; `other` None is the full cache."""
    rows = measured.of_task(setting, task, keep_ratio)
    if ours not in rows or (other is not None and other not in rows):
        return []
    mine = rows[ours]
    theirs = mine["score_full_per_sample"] if other is None else rows[other]["score_per_sample"]
    return list(zip(mine["score_per_sample"], theirs, strict=True))


def _counted(pairs: Sequence[tuple[float, float]]) -> str:
    if not pairs:
        return "–"
    return " / ".join(str(sum(holds)) for holds in zip(*((a > b, a == b, a < b) for a, b in pairs), strict=True))


def turns(measured: Measured, keep_ratio: float = KEEP_RATIO) -> Table:
    """Score of the conversation's facts by how many turns ago they were told."""
    from kvsculpt_vllm.evaluation.tasks.conversation import TOLD, TURNS

    body = []
    for setting in measured.settings:
        rows = measured.of_task(setting, "conversation", keep_ratio)
        full = {None: next(iter(rows.values()))} if rows else {}
        for way, row in [*full.items(), *rows.items()]:
            by_turn = row["score_full_per_question" if way is None else "score_per_question"]
            body.append([str(setting), str(way or "full cache"), *(f"{score:.2f}" for score in by_turn)])
    ago = (f"{TURNS - told} turn{'s' if TURNS - told > 1 else ''} ago" for told in TOLD)
    return [f"score, keep {keep_ratio:g}", "of", *ago], body


TABLES = {"tasks-scores": scores, "tasks-wins": wins, "tasks-leakage": leakage, "tasks-turns": turns}
"""By the names that docs/tables/ knows them by."""


def draw(measured: Measured, path: Path) -> Path:
    """Draw the mean over tasks against the keep ratio, for each setting; the interval is of all samples together."""
    import matplotlib

    matplotlib.use("Agg")  # no display where this runs
    import matplotlib.pyplot as plt

    count = len(measured.settings)
    figure, panels = plt.subplots(1, count, figsize=(6 * count, 4.5), layout="constrained", squeeze=False)
    ratios = sorted({row["keep_ratio"] for row in measured.rows})
    for axes, setting in zip(panels[0], measured.settings, strict=True):
        by_task = {ratio: [measured.of_task(setting, task, ratio) for task in TASKS] for ratio in ratios}
        for way in measured.ways:
            points = [
                (ratio, wilson(pooled))
                for ratio in ratios
                if (pooled := [s for rows in by_task[ratio] if way in rows for s in rows[way]["score_per_sample"]])
            ]
            if points:
                at, found = zip(*points, strict=True)
                means, low, high = (list(column) for column in zip(*found, strict=True))
                axes.plot(at, means, marker="o", label=str(way))
                axes.fill_between(at, low, high, alpha=0.15)
        full = [s for rows in by_task[ratios[0]] if rows for s in next(iter(rows.values()))["score_full_per_sample"]]
        if full:
            axes.axhline(mean(full), color="black", linestyle="--", label="full cache")
        axes.set(title=str(setting), xlabel="keep ratio", ylabel="score, mean over all samples", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main(
    folder: Annotated[Path, typer.Argument(help="Holds the files of `kvsculpt eval --tasks … --json`.")] = FOLDER,
    keep_ratio: Annotated[float, typer.Option(help="The one that tables are of.")] = KEEP_RATIO,
    min_samples: Annotated[int, typer.Option(min=1, help="Rows with fewer are left out.")] = MIN_SAMPLES,
    png: Annotated[Path | None, typer.Option(help="The picture; by default scores.png in the folder.")] = None,
) -> None:
    """Print scores with intervals, wins and losses, leakage, and conversations by turn; draw scores by keep ratio."""
    from rich.console import Console
    from rich.table import Table as Shown

    try:
        measured = Measured(read(folder), min_samples)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="FOLDER") from error
    if not measured.rows:
        message = f"{folder} holds no row of a task with {min_samples} samples or more: measure some first"
        raise typer.BadParameter(message, param_hint="FOLDER")
    if keep_ratio not in {row["keep_ratio"] for row in measured.rows}:
        there = ", ".join(f"{ratio:g}" for ratio in sorted({row["keep_ratio"] for row in measured.rows}))
        raise typer.BadParameter(f"got {keep_ratio:g}, measured: {there}", param_hint="--keep-ratio")
    made = {name: table(measured, keep_ratio) for name, table in TABLES.items()}
    for name, (heading, body) in made.items():
        shown = Shown(*heading, title=name)
        for line in body:
            shown.add_row(*line)
        Console(width=max(Console().width, 160)).print(shown)
    picture = draw(measured, png or folder / "scores.png")
    tables = {name: [dict(zip(heading, line, strict=True)) for line in body] for name, (heading, body) in made.items()}
    print(json.dumps({"folder": str(folder), "keep_ratio": keep_ratio, "png": str(picture), **tables}))


if __name__ == "__main__":
    typer.run(main)
