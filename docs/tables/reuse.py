"""Reuse and sharing: what a prompt gains that begins like one that was sculpted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .markdown import table
from .sources import result


def sharing() -> str:
    """What a prompt gains that begins like one that was sculpted."""
    found = result("sharing-smollm2-135m-cpu.json")
    second, turns, together = (found[name] for name in ("second_question", "conversation", "at_once"))
    rows = [
        [
            "another question about a document, first token",
            f"{second['exact_first_token_s']:.2f} s",
            f"{second['found_first_token_s']:.3f} s ({second['first_token_ratio']:.3f})",
        ],
        [
            "blocks held by it",
            str(second["blocks_exact"]),
            f"{second['blocks_found']} ({second['blocks_ratio']:.2f})",
        ],
        [
            f"{together['requests']} questions at once: blocks held at the end",
            str(together["blocks_exact"]),
            f"{together['blocks_sculpted']} ({together['ratio']:.2f})",
        ],
        [
            "four turns of a conversation: prompt tokens found in the cache",
            ", ".join(map(str, turns["cached_exact"])),
            f"{', '.join(map(str, turns['cached_sculpted']))} ({turns['ratio']:.2f})",
        ],
    ]
    return table(["", "exact", "sculpted (ratio)"], rows)


REUSE = ("reuse-smollm2-135m-cpu.json", "reuse-qwen2.5-coder-1.5b-cpu.json")
"""What `benchmarks/reuse.py` measured, of each model."""


def _both(found: dict[str, Any], part: str, when: str, key: str, form: Callable[[float], str]) -> list[str]:
    """A figure of both systems, the plugin's with what it is of stock vLLM's."""
    stock, plugin = (found[part][when][system][key] for system in ("stock", "plugin"))
    return [form(stock), f"{form(plugin)} ({plugin / stock:.2g}x)"]


def _per_second(rate: float) -> str:
    return f"{rate:.2f}"


def _waited(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def reuse_small() -> str:
    """The README's: many questions about more documents than fit."""
    found = result(REUSE[0])
    rows = [
        ["documents whose cache is there", *(str(found["resident"][name]) for name in ("stock", "plugin"))],
        ["requests/s once all are sculpted", *_both(found, "many", "steady", "requests_per_s", _per_second)],
        ["first token then, median", *_both(found, "many", "steady", "first_token_median_s", _waited)],
        ["requests/s from the start", *_both(found, "many", "in_all", "requests_per_s", _per_second)],
    ]
    return table(["", "stock vLLM, prefix cache on", "sculpted"], rows)


def reuse() -> str:
    """All of it."""
    found = result(REUSE[0])
    rows = [["documents resident at the end", *(str(found["resident"][name]) for name in ("stock", "plugin"))]]
    measures: list[tuple[str, str, Callable[[float], str]]] = [
        ("requests_per_s", "requests/s", _per_second),
        ("first_token_median_s", "first token, median", _waited),
        ("first_token_p99_s", "first token, 99th percentile", _waited),
        ("hit_rate", "prompt tokens found in the cache", lambda share: f"{100 * share:.0f} %"),
    ]
    few = f"{found['few_documents']} documents, all fit"
    for part, when, told in (
        ("many", "in_all", f"{found['documents']} documents, {found['questions']} questions each, from the start"),
        ("many", "steady", "the same, once each was asked about"),
        ("few", "in_all", f"{few}, from the start"),
        ("few", "steady", f"{few}, once each was asked about"),
    ):
        rows += [[f"{told}: {what}", *_both(found, part, when, key, form)] for key, what, form in measures]
    rows.append(["seconds sculpting, in all", "", _waited(found["many"]["in_all"]["plugin"]["sculpting_s"])])
    for part, told in (("restart", "after a restart, from the store"), ("precomputed", "precomputed, from the store")):
        first = found[part]["first"]
        exact, ours = first["exact_first_token_median_s"], first["first_token_median_s"]
        rows.append(
            [
                f"first question of a document {told}: first token",
                _waited(exact),
                f"{ours:.2f} s ({first['ratio']:.2g}x)",
            ]
        )
    return table(["", "stock vLLM, prefix cache on", "plugin"], rows)


def reuse_pays() -> str:
    """At how many questions a document pays, if stock vLLM computes it anew for each."""
    rows = []
    for name in REUSE:
        found = result(name)
        many, exact = found["many"], found["exact_prefill_s"]
        sculpted = many["in_all"]["plugin"]["sculpting_s"] / found["documents"]
        again = many["steady"]["plugin"]["first_token_median_s"]
        pays = math.ceil(sculpted / (exact - again))
        rows.append(
            [
                found["model"],
                _waited(exact),
                f"{_waited(sculpted)} ({sculpted / exact:.1f}x)",
                _waited(again),
                str(pays),
            ]
        )
    header = [
        "model",
        "a document, computed",
        "sculpted, once",
        "found, first token",
        "further questions that pay for it",
    ]
    return table(header, rows)


TABLES = {"sharing": sharing, "reuse-small": reuse_small, "reuse": reuse, "reuse-pays": reuse_pays}
