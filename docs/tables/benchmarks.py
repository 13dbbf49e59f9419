"""Tables that a benchmark makes of its own folder of results: tasks, bound, FP8."""

from __future__ import annotations

from functools import cache
from typing import Any

from .markdown import table
from .sources import ROOT, module


@cache
def tasks_benchmark() -> Any:
    """The module benchmarks/quality.py, which makes the tables of tasks from their own folder of results."""
    return module(ROOT / "benchmarks" / "quality.py")


def tasks(name: str) -> str:
    """One of the tables of tasks: scores, wins, leakage, conversations by turn."""
    benchmark = tasks_benchmark()
    header, body = benchmark.TABLES[name](benchmark.Measured(benchmark.read()))
    return table(header, body) if body else "Not measured yet."


def of_benchmark(file: str, *what: str) -> str:
    """A table that a benchmark makes of its own folder of results (its function `documented`)."""
    header, body = module(ROOT / "benchmarks" / file).documented(*what)
    return table(header, body) if body else "Not measured yet."


TABLES = {
    "tasks-scores": lambda: tasks("tasks-scores"),
    "tasks-wins": lambda: tasks("tasks-wins"),
    "tasks-leakage": lambda: tasks("tasks-leakage"),
    "tasks-turns": lambda: tasks("tasks-turns"),
    "bound-correlation": lambda: of_benchmark("bound.py", "correlation"),
    "bound-kept": lambda: of_benchmark("bound.py", "bounds"),
    "fp8": lambda: of_benchmark("fp8.py"),
}
