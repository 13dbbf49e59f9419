"""A folder that shows a result file's rows: an HTML page and its pictures."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from kvsculpt_vllm.evaluation.continuation import HEADS
from kvsculpt_vllm.evaluation.results import Row
from kvsculpt_vllm.sculpt.effort import EFFORTS
from kvsculpt_vllm.sculpt.solve import judged_after

matplotlib.use("Agg")  # no display where this runs
import matplotlib.pyplot as plt

LINES = {"adaptive": "-", "uniform": "--"}

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>kvsculpt eval: {title}</title>
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
 table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
 th, td {{ padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }}
 th:nth-child(-n+3), td:nth-child(-n+3) {{ text-align: left; }}
 img {{ max-width: 100%; }}
</style>
<h1>{title}</h1>
<p>{settings}</p>
{tables}
{figures}
</html>
"""


def write_report(folder: Path, rows: Sequence[Row], columns: dict[str, tuple[str, str]], num_kv_heads: int) -> Path:
    """Write `index.html` and its PNGs; returns the page's path.

    `rows` share their settings; `columns` are the numbers of the table (heading and format). Heat maps and
    convergence are of the method `sculpt`, or of the last one if it was not measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = rows[0]["settings"]
    title = f"{settings['model']} on {settings['text']}"
    pictures = [("KL(full || compressed) against keep ratio", _curves(folder / "kl.png", rows))]
    shown = "sculpt" if any(row["method"] == "sculpt" for row in rows) else rows[-1]["method"]
    for row in rows:
        if row["method"] != shown:
            continue
        name = f"{shown}, {row['budget']} budgets, keep ratio {row['keep_ratio']:g}"
        stem = f"{shown}-{row['budget']}-{row['keep_ratio']:g}"
        pictures.append((f"Heads: {name}", _heat_maps(folder / f"heads-{stem}.png", row, num_kv_heads)))
        if len(row["trace"]) > 1:
            pictures.append((f"Convergence: {name}", _convergence(folder / f"convergence-{stem}.png", row)))
    page = folder / "index.html"
    page.write_text(
        PAGE.format(
            title=html.escape(title),
            settings=html.escape(", ".join(f"{key} {value}" for key, value in settings.items())),
            tables=_table(rows, columns),
            figures="\n".join(
                f'<h2>{html.escape(caption)}</h2><img src="{html.escape(path.name)}" alt="{html.escape(caption)}">'
                for caption, path in pictures
            ),
        ),
        encoding="utf-8",
    )
    return page


def _table(rows: Iterable[Row], columns: dict[str, tuple[str, str]]) -> str:
    headings = ["keep ratio", "budget", "method", *(name.replace("_", " ") for name in columns)]
    lines = ["<tr>" + "".join(f"<th>{html.escape(heading)}</th>" for heading in headings) + "</tr>"]
    for row in rows:
        cells = [f"{row['keep_ratio']:g}", row["budget"], row["method"]]
        cells += [form.format(row[name]) for name, (_, form) in columns.items()]
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _curves(path: Path, rows: Sequence[Row]) -> Path:
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for i, method in enumerate(methods):
        for budget in dict.fromkeys(row["budget"] for row in rows):
            points = sorted(
                (row["keep_ratio"], row["kl_mean"])
                for row in rows
                if (row["method"], row["budget"]) == (method, budget) and row["kl_mean"] > 0
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True), LINES[budget], color=f"C{i}", marker="o", label=f"{method}, {budget}"
                )
    axes.set(yscale="log", xlabel="keep ratio", ylabel="mean KL(full || compressed), nats")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend(fontsize="small", ncols=2)
    return _save(figure, path)


def _heat_maps(path: Path, row: Row, num_kv_heads: int) -> Path:
    figure, panels = plt.subplots(1, len(HEADS), figsize=(4.5 * len(HEADS), 7), layout="constrained")
    for axes, (name, meaning) in zip(panels, HEADS.items(), strict=True):
        values = np.array(row["heads"][name]).reshape(-1, num_kv_heads)
        logarithmic = name != "entries" and (values > 0).any()
        image: dict[str, Any] = {"norm": "log"} if logarithmic else {}
        shown = np.where(values > 0, values, np.nan) if logarithmic else values
        drawn = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis", **image)
        axes.set(title=f"{name}\n{_wrapped(meaning)}", xlabel="KV head", ylabel="layer")
        axes.title.set_fontsize("small")
        axes.set_xticks(range(num_kv_heads))
        figure.colorbar(drawn, ax=axes)
    return _save(figure, path)


def _convergence(path: Path, row: Row) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    train, held_out = np.array(row["trace"]).T
    steps = judged_after(EFFORTS[row["settings"]["effort"]].key_steps)
    axes.plot(steps, train, marker="o", label="training queries")
    axes.plot(steps, held_out, marker="o", label="held-out queries (the last judged, where a head has stopped)")
    axes.set(xlabel="key steps", ylabel="loss, mean over heads and contexts", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return _save(figure, path)


def _wrapped(text: str, width: int = 44) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
