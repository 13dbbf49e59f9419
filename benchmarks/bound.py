"""How far a held-out error tells the KL that follows: `python benchmarks/bound.py --help`.

Reads the result files of `kvsculpt eval`, takes the held-out error and the KL of every context of the method sculpt,
prints Spearman's rank correlation of the two (C. Spearman, Am. J. Psychol. 15, 1904) and what a bound on the error
would have kept, draws one against the other, and ends with one JSON line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, NamedTuple

import typer
from scipy.stats import spearmanr

from kvsculpt_vllm.evaluation.rows import Row, read_rows

FOLDER = Path(__file__).parent / "results" / "bound"
BOUNDS = (0.03, 0.01, 0.003, 0.001)


class Point(NamedTuple):
    """One context at one keep ratio."""

    model: str
    text: str
    effort: str
    context: int  # which one of the text
    kept: float  # fraction
    error: float  # held-out
    kl: float  # mean over the tokens that follow


class Group(NamedTuple):
    """Points that are ranked together."""

    name: str
    points: list[Point]


def read(folder: Path) -> list[Point]:
    """All contexts of the result files of a folder, of sculpt with adaptive budgets.

    Raises:
        ValueError: a file is not a result file, or has no errors by context.
    """
    points = []
    for path in sorted(folder.glob("*.json")):
        try:
            for row in read_rows(path):
                if "kl_mean" in row and (row["method"], row["budget"]) == ("sculpt", "adaptive"):
                    points += _of(row)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is not a result file of `kvsculpt eval` that has errors by context") from error
    return points


def _of(row: Row) -> Iterable[Point]:
    settings = row["settings"]
    both = zip(row["held_out_error_per_context"], row["kl_per_context"], strict=True)
    for number, (error, kl) in enumerate(both):
        model, text = settings["model"].removesuffix("-Instruct"), settings["text"]
        yield Point(model, text, settings["effort"], number, row["kept_fraction"], error, kl)


def groups(points: Sequence[Point]) -> list[Group]:
    """All points of each model; those of each text; and the contexts of a text at one kept fraction, where only what
    sets one context apart from another is left to tell.
    """
    found = []
    for model in sorted({point.model for point in points}):
        mine = [point for point in points if point.model == model]
        found.append(Group(f"{model}, all", mine))
        for text in sorted({point.text for point in mine}):
            found.append(Group(f"{model}, {text}", [point for point in mine if point.text == text]))
        for kept in sorted({point.kept for point in mine}):
            found.append(Group(f"{model}, {kept:.2f} kept", [point for point in mine if point.kept == kept]))
    return [group for group in found if len(group.points) > 2]


def correlations(points: Sequence[Point]) -> list[list[str]]:
    """Name, number of points, and rank correlation of each group."""
    return [
        [
            group.name,
            str(len(group.points)),
            f"{spearmanr([p.error for p in group.points], [p.kl for p in group.points]).statistic:.2f}",
        ]
        for group in groups(points)
    ]


def at_bounds(points: Sequence[Point]) -> list[list[str]]:
    """What the least of the measured fractions that meets a bound comes to, for each model and text: the fraction kept,
    over contexts the least, the mean and the most, and the KL, mean and most. A context that none meets counts as kept
    whole, without loss.
    """
    body = []
    for model, text, effort in sorted({point[:3] for point in points}):
        mine = [point for point in points if point[:3] == (model, text, effort)]
        for bound in BOUNDS:
            chosen = [_least(mine, number, bound) for number in sorted({point.context for point in mine})]
            kept, kl = [point.kept for point in chosen], [point.kl for point in chosen]
            body.append(
                [
                    model,
                    text,
                    f"{bound:g}",
                    f"{min(kept):.2f}, {mean(kept):.2f}, {max(kept):.2f}",
                    f"{mean(kl):.5f}, {max(kl):.5f}",
                ]
            )
    return body


def _least(points: Sequence[Point], number: int, bound: float) -> Point:
    met = [point for point in points if point.context == number and point.error <= bound]
    whole = next(point for point in points if point.context == number)._replace(kept=1.0, error=0.0, kl=0.0)
    return min(met, key=lambda point: point.kept, default=whole)


TABLES = {
    "correlation": (["of", "contexts and ratios", "rank correlation of held-out error and KL"], correlations),
    "bounds": (
        ["model", "text", "error at most", "fraction kept: least, mean, most", "KL: mean, most"],
        at_bounds,
    ),
}
"""The heading of each table, and what makes its lines."""


def documented(name: str) -> tuple[list[str], list[list[str]]]:
    """Heading and lines of a table of docs/quality.md."""
    heading, lines = TABLES[name]
    return heading, lines(read(FOLDER))


def draw(points: Sequence[Point], path: Path) -> Path:
    """Draw KL against the held-out error of every context, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")  # no display where this runs
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 5), layout="constrained")
    for model, text in sorted({point[:2] for point in points}):
        mine = [point for point in points if point[:2] == (model, text)]
        axes.scatter([p.error for p in mine], [p.kl for p in mine], s=14, alpha=0.7, label=f"{model}, {text}")
    axes.set(xscale="log", yscale="log", xlabel="held-out error, mean over heads", ylabel="KL of what follows, nats")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main(
    folder: Annotated[Path, typer.Argument(help="Holds files of `kvsculpt eval --json`.")] = FOLDER,
    png: Annotated[Path | None, typer.Option(help="The picture; by default bound.png in the folder.")] = None,
) -> None:
    """Show how far held-out errors tell the KL, and what bounds on them keep."""
    from rich.console import Console
    from rich.table import Table

    try:
        points = read(folder)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="FOLDER") from error
    if not points:
        raise typer.BadParameter(f"{folder} holds no row of sculpt with adaptive budgets", param_hint="FOLDER")
    tables = {}
    for name, (heading, lines) in TABLES.items():
        body, shown = lines(points), Table(*heading, title=name)
        for line in body:
            shown.add_row(*line)
        Console(width=max(Console().width, 120)).print(shown)
        tables[name] = [dict(zip(heading, line, strict=True)) for line in body]
    picture = draw(points, png or folder / "bound.png")
    print(json.dumps({"folder": str(folder), "png": str(picture), **tables}))


if __name__ == "__main__":
    typer.run(main)
