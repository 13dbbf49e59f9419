"""Decoding on a GPU."""

from __future__ import annotations

from typing import Any

from .markdown import table
from .sources import result

_OURS = tuple(f"paged_attention, keep {keep}" for keep in (1, 0.3, 0.1))


def gpu() -> dict[str, dict[str, Any]]:
    """What each step of `benchmarks/gpu_day.sh` found on the H100."""
    record = result("gpu/nvidia-h100-80gb-hbm3.json")
    return {name: step["result"] for name, step in record["steps"].items()}


def gpu_small() -> str:
    """Decoding on a GPU, for the README."""
    body = []
    for tokens, batch in ((32768, 16), (8192, 64), (8192, 16)):
        flash, *ours = (_decoding(tokens, batch, system) for system in ("FlashAttention 3", *_OURS))
        body.append([f"{tokens:,} × {batch}", _milliseconds(flash), *(_beside(one, flash) for one in ours)])
    return table(["tokens × requests", "FlashAttention 3, full cache", "keep 1", "keep 0.3", "keep 0.1"], body)


def _decoding(tokens: int, batch: int, system: str, layout: str = "LBHNC") -> dict[str, Any]:
    (row,) = (
        row
        for row in gpu()["kernels"]["attention"]
        if (row["tokens"], row["batch"], row["system"], row["layout"]) == (tokens, batch, system, layout)
    )
    return row


def _milliseconds(row: dict[str, Any]) -> str:
    return f"{row['seconds'] * 1e3:.3f} ms"


def _beside(row: dict[str, Any], other: dict[str, Any]) -> str:
    return f"{_milliseconds(row)} ({other['seconds'] / row['seconds']:.2f}x)"


def gpu_decode() -> str:
    """Decoding on a GPU: every shape and both layouts, and how near to a copy's bytes a second."""
    body = []
    for tokens in (32768, 8192):
        for batch in (64, 16, 1):
            for layout in ("LBHNC", "BLHNC"):
                flash, *ours = (_decoding(tokens, batch, system, layout) for system in ("FlashAttention 3", *_OURS))
                told = [f"{_beside(one, flash)}, {one['of_copy']:.2f}" for one in ours]
                shape = [f"{tokens:,} × {batch}", layout, str(flash["layers"])]
                body.append([*shape, f"{_milliseconds(flash)}, {flash['of_copy']:.2f}", *told])
    header = ["tokens × requests", "layout", "layers in the cache", "FlashAttention 3"]
    return table([*header, *(f"keep {keep}" for keep in (1, 0.3, 0.1))], body)


TABLES = {"gpu-small": gpu_small, "gpu-decode": gpu_decode}
