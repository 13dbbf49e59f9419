"""The paper's figures beside ours."""

from __future__ import annotations

import ast

from .markdown import table
from .measured import BASELINE, PILOT, SCULPT, SMOLLM, TEXTS, Measured, kept, row_of
from .sources import ROOT


def paper() -> str:
    """The paper's table beside ours, of the same prose as far as there is any."""
    # Read and not imported: the benchmark brings matplotlib and transformers along.
    source = ast.parse((ROOT / "benchmarks" / "paper_table.py").read_text(encoding="utf-8"))
    (published,) = [
        ast.literal_eval(statement.value)
        for statement in source.body
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "PAPER"
    ]
    ratios = (0.3, 0.5, 0.7)
    rows = [
        ("paper", "Select+Fit, uniform", published["select_fit", "uniform"]),
        ("paper", "KVSculpt, uniform", published["kvsculpt", "uniform"]),
        ("paper", "KVSculpt, adaptive", published["kvsculpt", "adaptive"]),
    ]
    for name, what in (
        ("Select+Fit, uniform", BASELINE),
        ("sculpt, uniform", Measured("", "sculpt", "uniform")),
        ("sculpt, adaptive by a pilot", PILOT),
        ("sculpt, calibrated (not in the picture)", SCULPT),
    ):
        numbers = {ratio: row_of(SMOLLM, what, ratio, TEXTS[0])["kl_mean"] for ratio in ratios}
        rows.append(("ours, SmolLM2-135M", name, numbers))
    base, body = {}, []
    for origin, name, numbers in rows:
        first = base.setdefault(origin, numbers)  # Select+Fit of the same origin comes first
        body.append([origin, name, *(_gain(numbers, first, ratio, origin) for ratio in ratios)])
    return table(["of", "method, budgets", *kept(ratios)], body)


def _gain(numbers: dict[float, float], base: dict[float, float], ratio: float, origin: str) -> str:
    if ratio not in numbers:
        return "–"
    told = f"{numbers[ratio]:g}" if origin == "paper" else f"{numbers[ratio]:.5f}"
    return told if numbers is base else f"{told} ({base[ratio] / numbers[ratio]:.1f}x)"


TABLES = {"paper": paper}
