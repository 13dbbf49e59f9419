"""Serving: what is gained, and what it costs."""

from __future__ import annotations

from statistics import median
from typing import Any

from .markdown import table
from .sources import result


def serving() -> dict[str, Any]:
    """The result file of `benchmarks/serving.py`."""
    return result("serving-smollm2-135m-cpu.json")


def runs(system: str, room: int, concurrency: int) -> list[dict[str, Any]]:
    """The throughput runs of one system, at room for so many exact prompts."""
    wanted = (system, room, concurrency)
    return [run for run in serving()["throughput"] if (run["system"], run["room"], run["concurrency"]) == wanted]


def _rate(system: str, room: int, concurrency: int) -> float:
    return median(run["output_throughput"] for run in runs(system, room, concurrency))


def _seconds(system: str, measure: str, digits: int) -> str:
    (run,) = runs(system, 8, 16)
    return " s, ".join(f"{run[f'{rank}_{measure}_ms'] / 1000:.{digits}f}" for rank in ("median", "p99")) + " s"


def cost_small() -> str:
    """The README's: what is gained, and what it takes on a CPU."""
    capacity = {run["system"]: run for run in serving()["capacity"]}
    answers = serving()["quality"]
    waits = {name: runs(name, 8, 16)[0]["median_ttft_ms"] / 1000 for name in ("stock", "sculpt")}
    rows = [
        ["prompts held at once", *(str(capacity[name]["held_at_once"]) for name in ("stock", "sculpt"))],
        ["KV memory a prompt", *(_megabytes(answers[f"kv_bytes_{name}"]) for name in ("exact", "sculpted"))],
        ["tokens/s, 16 requests at a time", *(f"{_rate(name, 8, 16):.1f}" for name in ("stock", "sculpt"))],
        ["time to the first token, 16 at a time, median", *(f"{wait:.0f} s" for wait in waits.values())],
    ]
    return table(["", "stock vLLM", "every prompt sculpted"], rows)


def cost() -> str:
    """All that `benchmarks/serving.py` measured."""
    found, answers = serving(), serving()["quality"]
    stock, sculpt = found["capacity"]
    rates = {name: [run["output_throughput"] for run in runs(name, 8, 8)] for name in ("stock", "none")}
    rows = [
        [
            f"held at once of {stock['arrived']} that arrive together, before a preemption",
            str(stock["held_at_once"]),
            "",
            f"{sculpt['held_at_once']} ({found['held_ratio']:.1f}x)",
        ],
        ["preemptions", str(stock["preemptions"]), "", str(sculpt["preemptions"])],
        ["KV bytes a prompt", _megabytes(answers["kv_bytes_exact"]), "", _megabytes(answers["kv_bytes_sculpted"])],
        [
            "tokens/s, 8 at a time (three rounds, median of their ratios)",
            ", ".join(f"{rate:.1f}" for rate in rates["stock"]),
            ", ".join(f"{rate:.1f}" for rate in rates["none"]) + f" ({found['none_over_stock']:.2f})",
            "",
        ],
    ]
    for room, concurrency, told in ((8, 4, "memory is not short"), (8, 16, "memory for 8"), (32, 16, "memory for 32")):
        ours, theirs = _rate("sculpt", room, concurrency), _rate("stock", room, concurrency)
        name = f"tokens/s, {concurrency} at a time: {told}"
        rows.append([name, f"{theirs:.1f}", "", f"{ours:.1f} ({ours / theirs:.2f})"])
    for measure, what, digits in (("ttft", "time to the first token", 0), ("tpot", "time a further token", 1)):
        name = f"{what}, 16 at a time, memory for 8: median, 99th percentile"
        rows.append([name, _seconds("stock", measure, digits), "", _seconds("sculpt", measure, digits)])
    rows.append(
        [
            "greedy answers (64 tokens) equal to the exact ones",
            "",
            "",
            f"{answers['answers_equal']} of {answers['prompts']}; on average the first "
            f"{100 * answers['share_equal_mean']:.0f} % are",
        ]
    )
    return table(["", "stock vLLM", "every request `none`", "every one sculpted"], rows)


def answers() -> str:
    """Throughput by the length of answers, with memory short and with plenty."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for row in result("answers-smollm2-135m-cpu.json")["answers"]:
        rows.setdefault((row["room"], row["answer"]), {})[row["system"]] = row
    body = []
    for (room, length), both in rows.items():
        stock, ours = both["stock"], both["sculpt"]
        rates = [row["output_throughput"] for row in (stock, ours)]
        body.append(
            [
                f"{room} of {stock['concurrency']}",
                str(length),
                f"{rates[0]:.0f}",
                f"{rates[1]:.0f} ({rates[1] / rates[0]:.2f})",
                f"{stock['preemptions']}, {ours['preemptions']}",
            ]
        )
    return table(["memory for", "tokens of an answer", "tokens/s, stock", "sculpted (ratio)", "preemptions"], body)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


TABLES = {"cost-small": cost_small, "cost": cost, "answers": answers}
