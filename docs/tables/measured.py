"""The rows of `kvsculpt eval` that tables of quality are made of, and the methods that they compare."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

from .sources import result

SMOLLM, QWEN = "eval-smollm2-135m.json", "eval-qwen2.5-coder-1.5b.json"
GEMMA = "eval-gemma-3-270m.json"
RATIOS = (0.1, 0.3, 0.5, 0.7)
TEXTS = ("moby-dick-1-67.txt", "pydoc")


class Measured(NamedTuple):
    """What was measured of one method: the columns of a result file that tell its rows apart."""

    label: str
    method: str
    budget: str
    effort: str = "balanced"
    calibrated: bool = False


SCULPT = Measured("**sculpt** (default), calibrated", "sculpt", "adaptive", calibrated=True)
PILOT = Measured("**sculpt**, `balanced`, adaptive by a pilot", "sculpt", "adaptive")
MATCHING = Measured("Attention Matching, adaptive", "attention_matching", "adaptive")
EXPECTED = Measured("Expected Attention, adaptive", "expected_attention", "adaptive")
SELECTION = Measured("selection, uniform budgets", "select", "uniform")
BASELINE = Measured("Select+Fit, uniform (the paper's baseline)", "select_fit", "uniform")
PEERS = (
    Measured("KeyDiff, adaptive", "keydiff", "adaptive"),
    Measured("SnapKV, adaptive", "snapkv", "adaptive"),
    EXPECTED,
    Measured("Attention Matching, uniform", "attention_matching", "uniform"),
    MATCHING,
)


def rows_of(file: str) -> list[dict[str, Any]]:
    """The rows of a result file of `kvsculpt eval`."""
    return result(file)


def row_of(
    file: str, what: Measured, ratio: float, text: str, task: str | None = None, segment: int = 0
) -> dict[str, Any] | None:
    """The row with the most contexts, if there is one."""
    found = [
        row
        for row in rows_of(file)
        if (row["method"], row["budget"], row["keep_ratio"]) == (what.method, what.budget, ratio)
        and (row["settings"]["text"], row["settings"]["effort"]) == (text, what.effort)
        and (row["settings"].get("calibration", "none") != "none") == what.calibrated
        and row["settings"].get("task") == task
        and row["settings"].get("segment", 0) == segment
    ]
    return max(found, key=lambda row: row["settings"]["num_contexts"], default=None)


def kl(file: str, what: Measured, ratio: float) -> tuple[float, float] | None:
    """Mean KL over the contexts of both texts, and the larger of the texts' 99th percentiles; None if not measured.

    The two texts have as many contexts each: a mean of fewer would not be comparable with the other rows.
    """
    rows = [row for text in TEXTS if (row := row_of(file, what, ratio, text)) is not None]
    most = max(row["settings"]["num_contexts"] for row in rows_of(file) if "task" not in row["settings"])
    if len(rows) < len(TEXTS) or any(row["settings"]["num_contexts"] != most for row in rows):
        return None
    return mean(row["kl_mean"] for row in rows), max(row["kl_p99"] for row in rows)


def num_contexts(file: str) -> int:
    """Contexts of both texts together that the tables are made of."""
    return sum(row_of(file, SELECTION, 0.3, text)["settings"]["num_contexts"] for text in TEXTS)


def kept(ratios: Sequence[float]) -> list[str]:
    """The heading of a column for each keep ratio."""
    return [f"keep {ratio:g}" for ratio in ratios]
