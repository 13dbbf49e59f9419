"""The paper's table beside ours: `python benchmarks/paper_table.py --help`.

Measures what its result file does not hold yet (`kvsculpt eval`'s, so either resumes the other), prints the table,
draws it, and ends with one JSON line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import typer
from rich.console import Console
from rich.table import Table

from kvsculpt_vllm.evaluation.run import Request, run

matplotlib.use("Agg")  # no display where this runs
import matplotlib.pyplot as plt

PAPER = {
    ("select_fit", "uniform"): {0.3: 0.233, 0.5: 0.186, 0.7: 0.125},
    ("kvsculpt", "uniform"): {0.3: 0.0575, 0.5: 0.0463, 0.7: 0.0358},
    ("kvsculpt", "adaptive"): {0.3: 0.0431},
}
"""KL of arXiv 2603.27819: Qwen2.5-1.5B-Instruct, 2048-token contexts of PG19. About 170 s a context on an A100, by a
second-hand report."""

OURS = (("select_fit", "uniform"), ("attention_matching", "adaptive"), ("sculpt", "uniform"), ("sculpt", "adaptive"))
BASELINE = ("select_fit", "uniform")


def main(
    model: Annotated[str, typer.Option(help="As for kvsculpt eval.")] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="As for kvsculpt eval.")] = "pydoc",
    num_contexts: Annotated[int, typer.Option(min=1)] = 8,
    context: Annotated[int, typer.Option(min=1)] = 2048,
    effort: Annotated[str, typer.Option(help="fast, balanced or thorough.")] = "balanced",
    paper_method: Annotated[
        bool, typer.Option(help="Also run KVSculpt as published, 100 key steps one head at a time: slow.")
    ] = False,
    results: Annotated[Path, typer.Option(help="Result file, PNG beside it.")] = Path("benchmarks/results/paper.json"),
) -> None:
    """Print KL and gain of the paper and of ours, each with its setting."""
    wanted = [*OURS, ("kvsculpt_paper", "uniform")] if paper_method else list(OURS)
    console, ours = Console(stderr=True), {}
    ratios = sorted(PAPER[BASELINE])
    for method, budget in wanted:
        request = Request(
            model=model,
            text=text,
            context=context,
            continuation=256,
            num_contexts=num_contexts,
            keep_ratios=ratios,
            methods=[method],
            budgets=[budget],
            effort=effort,
            block_size=32,
            seed=0,
            device="cpu",
        )
        for row in run(request, results, console):
            ours.setdefault((method, budget), {})[row["keep_ratio"]] = row
    kl = {key: {ratio: row["kl_mean"] for ratio, row in rows.items()} for key, rows in ours.items()}
    seconds = {key: sum(row["seconds"] for row in rows.values()) / len(rows) for key, rows in ours.items()}
    setting = f"{Path(model).name}, {num_contexts} contexts of {context} tokens of {Path(text).name}, effort {effort}"
    table = Table(title="KL(full || compressed) in nats; gain over Select+Fit with uniform budgets of the same setting")
    for heading in ("of", "method", "budget", *(f"keep {ratio:g}" for ratio in ratios), "seconds a context"):
        table.add_column(heading)
    for origin, numbers in (("paper", PAPER), ("ours", kl)):
        for (method, budget), values in numbers.items():
            cells = [
                f"{values[ratio]:.4g} ({numbers[BASELINE][ratio] / values[ratio]:.1f}x)" if ratio in values else "-"
                for ratio in ratios
            ]
            taken = "about 170 (A100, second-hand)" if method == "kvsculpt" else "-"
            if origin == "ours":
                taken = f"{seconds[method, budget]:.1f}"
            table.add_row(origin, method, budget, *cells, taken)
    out = Console(width=140)
    out.print(table)
    out.print(
        "paper: Qwen2.5-1.5B-Instruct, contexts of 2048 tokens of PG19 (arXiv 2603.27819)", f"ours: {setting}", sep="\n"
    )
    picture = _draw(results.with_suffix(".png"), kl)
    line = {"/".join(key): values for key, values in kl.items()}
    print(
        json.dumps(
            {
                "setting": setting,
                "kl": line,
                "seconds": {"/".join(k): v for k, v in seconds.items()},
                "png": str(picture),
            }
        )
    )


def _draw(path: Path, kl: dict[tuple[str, str], dict[float, float]]) -> Path:
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for origin, numbers, style in (("paper", PAPER, "--"), ("ours", kl, "-")):
        for (method, budget), values in numbers.items():
            axes.plot(
                *zip(*sorted(values.items()), strict=True), style, marker="o", label=f"{origin}: {method}, {budget}"
            )
    axes.set(yscale="log", xlabel="keep ratio", ylabel="mean KL(full || compressed), nats")
    axes.grid(alpha=0.3, which="both")
    figure.legend(fontsize="small", loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    typer.run(main)
