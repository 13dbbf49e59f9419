"""What a chain loses as it grows, and as it is read from afar, by the results of `benchmarks/chains.py`."""

from __future__ import annotations

from .markdown import table
from .sources import RESULTS, result


def chains(part: str, first: str) -> str:
    """KL, mean and 99th percentile, of each text, and each fraction of an answer that is kept. `part` is one
    of the benchmark's, `first` the first column's name.
    """
    every = [result(f"chains/{path.name}") for path in sorted((RESULTS / "chains").glob("*.json"))]
    results = [found for found in every if part in found]
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


TABLES = {
    "chains-answers": lambda: chains("answers", "segments of the answer"),
    "chains-afar": lambda: chains("afar", "other tokens between"),
}
