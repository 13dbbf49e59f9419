"""Quality: KL of every method, held-out errors, long contexts, retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from .markdown import table
from .measured import (
    BASELINE,
    EXPECTED,
    GEMMA,
    MATCHING,
    PEERS,
    PILOT,
    QWEN,
    RATIOS,
    SCULPT,
    SELECTION,
    SMOLLM,
    TEXTS,
    Measured,
    kept,
    kl,
    num_contexts,
    row_of,
    rows_of,
)

LONG, LONG_GEMMA = "quality-segments-smollm2-135m.json", "quality-segments-gemma-3-270m.json"
LONG_SIX, LONG_QWEN = "quality-segments-smollm2-135m-6-contexts.json", "quality-segments-qwen2.5-coder-1.5b.json"
SNAPKV = ("SnapKV, at once", Measured("", "snapkv", "adaptive"), 0)
KVZIP = ("KVzip, at once", Measured("", "kvzip", "adaptive"), 0)
AT_ONCE = [("Attention Matching, at once", MATCHING, 0), ("Expected Attention, at once", EXPECTED, 0)]
TASKS = ("niah", "multikey", "tracking")
MAIN = (
    SELECTION,
    BASELINE,
    *PEERS,
    Measured("**sculpt**, `fast`, adaptive by a pilot", "sculpt", "adaptive", "fast"),
    PILOT,
    Measured("**sculpt**, `fast`, calibrated", "sculpt", "adaptive", "fast", calibrated=True),
    SCULPT,
)
UNIFORM = (
    Measured("KeyDiff", "keydiff", "uniform"),
    Measured("SnapKV", "snapkv", "uniform"),
    Measured("Expected Attention", "expected_attention", "uniform"),
    Measured("selection", "select", "uniform"),
    Measured("Select+Fit", "select_fit", "uniform"),
    Measured("Attention Matching", "attention_matching", "uniform"),
    Measured("sculpt", "sculpt", "uniform"),
    Measured("sculpt, calibrated: entries in the order of foretold queries", "sculpt", "uniform", calibrated=True),
)


def quality(file: str, model: str, measured: Sequence[Measured]) -> str:
    """KL of several methods at every keep ratio. A method that was not measured on both texts is left out."""
    body = []
    for what in measured:
        found = [kl(file, what, ratio) for ratio in RATIOS]
        if any(found):
            body.append([what.label, *("–" if one is None else f"{one[0]:.5f} / {one[1]:.4f}" for one in found)])
    return table([f"{model}, {num_contexts(file)} contexts", *kept(RATIOS)], body)


def quality_small() -> str:
    """The README's: mean KL alone, of what a reader compares first."""
    ratios, files = (0.1, 0.3, 0.5), {"SmolLM2-135M": SMOLLM, "Qwen2.5-Coder-1.5B": QWEN}
    header = ["", *(f"{model}, keep {ratio:g}" for model in files for ratio in ratios)]
    shown = {
        "selection, the same budget for every head": SELECTION,
        "Select+Fit, the paper's baseline": BASELINE,
        "Attention Matching, adaptive budgets": MATCHING,
        "**sculpt**, adaptive budgets, calibrated": SCULPT,
    }
    return table(
        header,
        [[name, *(f"{kl(file, what, r)[0]:#.2g}" for file in files.values() for r in ratios)]
         for name, what in shown.items()],
    )  # fmt: skip


def quality_lead() -> str:
    """How many times the best peer's KL is sculpt's."""
    body = []
    for model, file in (("SmolLM2-135M", SMOLLM), ("Qwen2.5-Coder-1.5B", QWEN)):
        best = [min(kl(file, peer, ratio)[0] for peer in PEERS) for ratio in RATIOS]
        for name, what in (("calibrated", SCULPT), ("by a pilot", PILOT)):
            lead = (f"{peer / kl(file, what, ratio)[0]:.1f}" for peer, ratio in zip(best, RATIOS, strict=True))
            body.append([f"{model}, sculpt {name}", *lead])
    return table(["best peer's KL / sculpt's", *kept(RATIOS)], body)


def held_out() -> str:
    """What is typical of the error that `max_error` bounds."""
    body = []
    for model, file in (("SmolLM2-135M", SMOLLM), ("Qwen2.5-Coder-1.5B", QWEN)):
        rows = [[row_of(file, SCULPT, ratio, text) for text in TEXTS] for ratio in RATIOS]
        body.append([model, *(f"{mean(row['held_out_error_after'] for row in pair):#.2g}" for pair in rows)])
    return table(["held-out error", *kept(RATIOS)], body)


def quality_by_text(file: str, model: str, measured: Sequence[Measured] = (MATCHING, PILOT, SCULPT)) -> str:
    """Mean KL on each of the texts: where a method gains and where it loses."""
    names = {"moby-dick-1-67.txt": "*Moby-Dick*", "pydoc": "Python's documentation"}
    body = [
        [f"{what.label}, {names[text]}", *(f"{row_of(file, what, ratio, text)['kl_mean']:.5f}" for ratio in RATIOS)]
        for what in measured
        for text in TEXTS
        if row_of(file, what, RATIOS[0], text)
    ]
    return table([model, *kept(RATIOS)], body)


def segments(file: str, model: str, peers: Sequence[tuple[str, Measured, int]]) -> str:
    """KL of long contexts: sculpt in segments, and others, each with the length of its segments, 0 for at once."""
    body = [[name, *map(_mean_and_p99, rows)] for name, what, size in peers if any(rows := _long(file, what, size))]
    for size in sorted({row["settings"]["segment"] for row in rows_of(file)}):
        cut = f"segments of {size:,}" if size else "at once"
        for name, what in (("`balanced`", SCULPT), ("`fast`", SCULPT._replace(effort="fast"))):
            if any(rows := _long(file, what, size)):
                body.append([f"**sculpt**, {name}, {cut}", *map(_mean_and_p99, rows)])
    return table([f"{model}, 7,900 tokens, keep 0.3", "*Moby-Dick*", "Python's documentation"], body)


def _long(file: str, what: Measured, segment: int) -> list[dict[str, Any] | None]:
    """The rows of both texts."""
    return [row_of(file, what, 0.3, text, segment=segment) for text in TEXTS]


def _mean_and_p99(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['kl_mean']:.5f} / {row['kl_p99']:.4f}"


def retrieval() -> str:
    """Shares of the full cache's score, and of how many samples of each task they are."""
    shown = {
        "Expected Attention": Measured("", "expected_attention", "adaptive"),
        "selection by attention": Measured("", "select", "adaptive"),
        "Attention Matching": MATCHING,
        "**sculpt**, by a pilot": PILOT,
        "**sculpt** (default), calibrated": SCULPT,
    }
    body = []
    for name, what in shown.items():
        rows = [row_of(QWEN, what, 0.3, TEXTS[0], task) for task in TASKS]
        shares = (f"{row['score'] / row['score_full']:.2g}" for row in rows)
        samples = ", ".join(str(row["settings"]["num_contexts"]) for row in rows)
        body.append([name, *shares, samples])
    return table(["Qwen2.5-Coder-1.5B, keep 0.3", "needle", "key-value lines", "variable tracking", "samples"], body)


TABLES = {
    "quality-small": quality_small,
    "quality-smollm2": lambda: quality(SMOLLM, "SmolLM2-135M", MAIN),
    "quality-qwen": lambda: quality(QWEN, "Qwen2.5-Coder-1.5B", MAIN),
    "quality-gemma": lambda: quality(GEMMA, "Gemma 3 270M", MAIN),
    "quality-gemma-by-text": lambda: quality_by_text(GEMMA, "Gemma 3 270M", (SELECTION, MATCHING, SCULPT)),
    "quality-lead": quality_lead,
    "held-out": held_out,
    "quality-smollm2-by-text": lambda: quality_by_text(SMOLLM, "SmolLM2-135M"),
    "quality-qwen-by-text": lambda: quality_by_text(QWEN, "Qwen2.5-Coder-1.5B"),
    "uniform-smollm2": lambda: quality(SMOLLM, "SmolLM2-135M", UNIFORM),
    "uniform-qwen": lambda: quality(QWEN, "Qwen2.5-Coder-1.5B", UNIFORM),
    "segments": lambda: segments(LONG, "SmolLM2-135M", AT_ONCE),
    "segments-six": lambda: segments(LONG_SIX, "SmolLM2-135M, 6 contexts", [SNAPKV, *AT_ONCE]),
    "segments-qwen": lambda: segments(LONG_QWEN, "Qwen2.5-Coder-1.5B, 2 contexts", [KVZIP, SNAPKV, *AT_ONCE]),
    "segments-gemma": lambda: segments(
        LONG_GEMMA,
        "Gemma 3 270M",
        [
            ("selection, adaptive, segments of 2,048", Measured("", "select", "adaptive"), 2048),
            SNAPKV,
            *AT_ONCE,
        ],
    ),
    "retrieval": retrieval,
}
