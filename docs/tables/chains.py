"""What a chain loses as it grows or is read from afar, and what it gets right, by results of `benchmarks/chains.py`."""

from __future__ import annotations

from typing import Any

from .markdown import table
from .sources import RESULTS, result


def with_part(part: str) -> list[dict[str, Any]]:
    """The results that have one of the benchmark's parts."""
    every = [result(f"chains/{path.name}") for path in sorted((RESULTS / "chains").glob("*.json"))]
    return [found for found in every if part in found]


def chains(part: str, first: str) -> str:
    """KL, mean and 99th percentile, of each text, and each fraction of an answer that is kept. `part` is one
    of the benchmark's, `first` the first column's name.
    """
    results = with_part(part)
    kept = [found.get("decode_keep_ratio") or found["keep_ratio"] for found in results]
    told = [f", keep {ratio:g}" if len(set(kept)) > 1 else "" for ratio in kept]
    lines = list(dict.fromkeys(key for found in results for key in found[part]))
    body = [
        [f"{int(key):,}", *(f"{row['kl_mean']:.5f} / {row['kl_p99']:.4f}" for row in (r[part][key] for r in results))]
        for key in lines
        if all(key in found[part] for found in results)
    ]
    headings = [f"{found['text']}{more}, KL" for found, more in zip(results, told, strict=True)]
    return table([first, *headings], body) if body else "Not measured yet."


def work() -> str:
    """The share of a task's tokens that are found, by how many segments the answer has come to, for each fraction of an
    answer that is kept.
    """
    results = with_part("work")
    kept = [found["decode_keep_ratio"] or found["keep_ratio"] for found in results]
    body = [
        [task, made, *(f"{row['right']:.2f}, {row['right_full']:.2f}" for row in rows)]
        for task in (results[0]["work"] if results else ())
        for made in results[0]["work"][task]
        if len(rows := [found["work"][task][made] for found in results if made in found["work"][task]]) == len(results)
    ]
    headings = [f"answer kept at {ratio:g}; full cache" for ratio in kept]
    return table(["task", "segments of the answer", *headings], body) if body else "Not measured yet."


TABLES = {
    "chains-work": work,
    "chains-answers": lambda: chains("answers", "segments of the answer"),
    "chains-afar": lambda: chains("afar", "other tokens between"),
}
