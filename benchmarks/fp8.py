"""KL against bytes: a cache in 16 bits or FP8, whole or sculpted: `python benchmarks/fp8.py --help`.

Reads result files of `kvsculpt eval` by the methods sculpt, sculpt_hadamard_fp8, sculpt_fp8 and sculpt_rounded_fp8,
prints a table, draws it, and ends with one JSON line. Bytes are of the context, as a fraction of what it takes in 16
bits; the scales of FP8, two numbers a KV head, are left out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Annotated, NamedTuple

import typer

from kvsculpt_vllm.evaluation.rows import Row, read_rows

FOLDER = Path(__file__).parent / "results" / "fp8"
WAYS = {
    "sculpt": "16 bits, sculpt",
    "sculpt_rounded_fp8": "FP8, sculpt rounded afterwards",
    "sculpt_fp8": "FP8, sculpt fitted to it",
    "sculpt_hadamard_fp8": "FP8 turned, sculpt fitted to it",
}
ALONE = {"sculpt_fp8": "FP8 alone", "sculpt_hadamard_fp8": "FP8 turned, alone"}
BYTES = {"sculpt": 1.0, "sculpt_fp8": 0.5, "sculpt_rounded_fp8": 0.5, "sculpt_hadamard_fp8": 0.5}


class Point(NamedTuple):
    """One way to keep the contexts of a model."""

    model: str
    way: str
    keep_ratio: float
    bytes: float  # of those in 16 bits
    kl: float  # mean over texts
    p99: float  # the largest of a text


def read(folder: Path = FOLDER) -> list[Point]:
    """The points of a folder's result files; none if it is not there.

    Raises:
        ValueError: a file is not a result file.
    """
    rows = defaultdict[tuple[str, str, float], list[Row]](list)
    for path in sorted(folder.glob("*.json")):
        for row in read_rows(path):
            if row["method"] in WAYS:
                rows[row["settings"]["model"], row["method"], row["keep_ratio"]].append(row)
    return sorted(_points(rows))


def _points(rows: dict[tuple[str, str, float], list[Row]]) -> Iterable[Point]:
    for (model, method, ratio), found in rows.items():
        if ratio == 1 and method not in ALONE:  # nothing is fitted: the same twice, and a copy of everything
            continue
        way = ALONE[method] if ratio == 1 else WAYS[method]
        size = BYTES[method] * mean(row["kept_fraction"] for row in found)
        kl, p99 = mean(row["kl_mean"] for row in found), max(row["kl_p99"] for row in found)
        yield Point(model.removesuffix("-Instruct"), way, ratio, size, kl, p99)


def shown(points: Iterable[Point]) -> tuple[list[str], list[list[str]]]:
    """Heading and lines of the table: the fewest bytes first."""
    body = [
        [point.model, f"{point.bytes:.2f}", point.way, f"{point.keep_ratio:g}", f"{point.kl:.5f} / {point.p99:.4f}"]
        for point in sorted(points, key=lambda point: (point.model, point.bytes, point.way))
    ]
    return ["model", "bytes, of 16 bits", "cache", "keep", "KL"], body


def documented() -> tuple[list[str], list[list[str]]]:
    """Heading and lines of the table of docs/quality.md."""
    return shown(read())


def draw(points: list[Point], path: Path) -> None:
    """Draw KL against bytes, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")  # no display where this runs
    import matplotlib.pyplot as plt

    models = sorted({point.model for point in points})
    figure, panels = plt.subplots(1, len(models), figsize=(5.5 * len(models), 4.2), layout="constrained", squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        alone = zip(ALONE.values(), ("kx", "k*"), strict=True)
        for way, form in (*alone, *zip(WAYS.values(), ("C0o-", "C1^:", "C2s:", "C3s-"), strict=True)):
            mine = sorted((p.bytes, p.kl) for p in points if (p.model, p.way) == (model, way))
            if mine:
                axes.plot([size for size, _ in mine], [kl for _, kl in mine], form, label=way)
        axes.set(title=model, yscale="log", xlabel="bytes of the context, of those in 16 bits", ylabel="KL, nats")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    folder: Annotated[Path, typer.Argument(help="Holds files of `kvsculpt eval --json`.")] = FOLDER,
    png: Annotated[Path | None, typer.Option(help="The picture; by default fp8.png in the folder.")] = None,
) -> None:
    """Show what a cache of FP8 loses, and what sculpt loses at as many bytes."""
    from rich.console import Console
    from rich.table import Table

    try:
        points = read(folder)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="FOLDER") from error
    if not points:
        raise typer.BadParameter(f"{folder} holds no row of {', '.join(WAYS)}", param_hint="FOLDER")
    heading, body = shown(points)
    table = Table(*heading)
    for line in body:
        table.add_row(*line)
    Console(width=max(Console().width, 110)).print(table)
    picture = png or folder / "fp8.png"
    draw(points, picture)
    print(json.dumps({"folder": str(folder), "png": str(picture), "points": [point._asdict() for point in points]}))


if __name__ == "__main__":
    typer.run(main)
