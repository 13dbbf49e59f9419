"""Rewrite the generated tables of README.md and docs/*.md: `make docs`.

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``. It comes from the result files in
benchmarks/results or from the code, so that no number and no flag is written down twice. `tests/docs/test_tables.py`
fails while a table is not what this script would write.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(\n<!-- end: \2 -->)", re.DOTALL)
MARKER = re.compile(r"^<!-- (?:generated|end): ([\w-]+) -->$", re.MULTILINE)

SMOLLM, QWEN = "eval-smollm2-135m.json", "eval-qwen2.5-coder-1.5b.json"
LONG = "quality-segments-smollm2-135m.json"
RATIOS = (0.1, 0.3, 0.5, 0.7)
TEXTS = ("moby-dick-1-67.txt", "pydoc")
TASKS = ("niah", "multikey", "tracking")


def documents() -> list[Path]:
    """The files that may hold generated tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def renewed(text: str) -> str:
    """`text` with each of its generated tables as it is now.

    Raises:
        ValueError: a marker without its other half, or a table that nobody generates.
    """
    found = [name for _, name, _ in PART.findall(text)]
    if sorted(MARKER.findall(text)) != sorted(2 * found):
        raise ValueError(f"markers without their other half, other than those of {', '.join(found) or 'no table'}")
    if unknown := set(found) - TABLES.keys():
        raise ValueError(f"unknown tables {', '.join(sorted(unknown))}, known are {', '.join(TABLES)}")
    return PART.sub(lambda part: part[1] + TABLES[part[2]]() + part[3], text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


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
)


@cache
def rows_of(file: str) -> list[dict[str, Any]]:
    """The rows of a result file of `kvsculpt eval`."""
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


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


def quality(file: str, model: str, measured: Sequence[Measured]) -> str:
    """KL of several methods at every keep ratio. A method that was not measured on both texts is left out."""
    body = []
    for what in measured:
        found = [kl(file, what, ratio) for ratio in RATIOS]
        if any(found):
            body.append([what.label, *("–" if one is None else f"{one[0]:.5f} / {one[1]:.4f}" for one in found)])
    return table([f"{model}, {num_contexts(file)} contexts", *_kept(RATIOS)], body)


def _kept(ratios: Sequence[float]) -> list[str]:
    return [f"keep {ratio:g}" for ratio in ratios]


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
    return table(["best peer's KL / sculpt's", *_kept(RATIOS)], body)


def held_out() -> str:
    """What is typical of the error that `max_error` bounds."""
    body = []
    for model, file in (("SmolLM2-135M", SMOLLM), ("Qwen2.5-Coder-1.5B", QWEN)):
        rows = [[row_of(file, SCULPT, ratio, text) for text in TEXTS] for ratio in RATIOS]
        body.append([model, *(f"{mean(row['held_out_error_after'] for row in pair):#.2g}" for pair in rows)])
    return table(["held-out error", *_kept(RATIOS)], body)


def quality_by_text(file: str, model: str) -> str:
    """Mean KL on each of the texts: where a method gains and where it loses."""
    names = {"moby-dick-1-67.txt": "*Moby-Dick*", "pydoc": "Python's documentation"}
    body = [
        [f"{what.label}, {names[text]}", *(f"{row_of(file, what, ratio, text)['kl_mean']:.5f}" for ratio in RATIOS)]
        for what in (MATCHING, PILOT, SCULPT)
        for text in TEXTS
    ]
    return table([model, *_kept(RATIOS)], body)


def segments() -> str:
    """KL of long contexts: sculpt in segments, and peers that take them at once."""
    names = [("Attention Matching, at once", MATCHING), ("Expected Attention, at once", EXPECTED)]
    body = [[name, *map(_mean_and_p99, rows)] for name, what in names if any(rows := _long(what, 0))]
    sizes = sorted({row["settings"]["segment"] for row in rows_of(LONG) if row["settings"]["segment"]})
    for size in sizes:
        for name, what in (("`balanced`", SCULPT), ("`fast`", SCULPT._replace(effort="fast"))):
            if any(rows := _long(what, size)):
                body.append([f"**sculpt**, {name}, segments of {size:,}", *map(_mean_and_p99, rows)])
    return table(["SmolLM2-135M, 7,900 tokens, keep 0.3", "*Moby-Dick*", "Python's documentation"], body)


def _long(what: Measured, segment: int) -> list[dict[str, Any] | None]:
    """The rows of both texts."""
    return [row_of(LONG, what, 0.3, text, segment=segment) for text in TEXTS]


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


@cache
def tasks_benchmark() -> Any:
    """The module benchmarks/quality.py, which makes the tables of tasks from their own folder of results."""
    return _module(ROOT / "benchmarks" / "quality.py")


def _module(path: Path) -> Any:
    """A file that is no part of a package, as a module."""
    spec = spec_from_file_location(f"tables_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tasks(name: str) -> str:
    """One of the tables of tasks: scores, wins, leakage, conversations by turn."""
    benchmark = tasks_benchmark()
    header, body = benchmark.TABLES[name](benchmark.Measured(benchmark.read()))
    return table(header, body) if body else "Not measured yet."


def of_benchmark(file: str, *what: str) -> str:
    """A table that a benchmark makes of its own folder of results (its function `documented`)."""
    header, body = _module(ROOT / "benchmarks" / file).documented(*what)
    return table(header, body) if body else "Not measured yet."


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
    return table(["of", "method, budgets", *_kept(ratios)], body)


def _gain(numbers: dict[float, float], base: dict[float, float], ratio: float, origin: str) -> str:
    if ratio not in numbers:
        return "–"
    told = f"{numbers[ratio]:g}" if origin == "paper" else f"{numbers[ratio]:.5f}"
    return told if numbers is base else f"{told} ({base[ratio] / numbers[ratio]:.1f}x)"


@cache
def serving() -> dict[str, Any]:
    """The result file of `benchmarks/serving.py`."""
    return json.loads((RESULTS / "serving-smollm2-135m-cpu.json").read_text(encoding="utf-8"))


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


def sharing() -> str:
    """What a prompt gains that begins like one that was sculpted."""
    found = json.loads((RESULTS / "sharing-smollm2-135m-cpu.json").read_text(encoding="utf-8"))
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


def _reused(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


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
    found = _reused(REUSE[0])
    rows = [
        ["documents whose cache is there", *(str(found["resident"][name]) for name in ("stock", "plugin"))],
        ["requests/s once all are sculpted", *_both(found, "many", "steady", "requests_per_s", _per_second)],
        ["first token then, median", *_both(found, "many", "steady", "first_token_median_s", _waited)],
        ["requests/s from the start", *_both(found, "many", "in_all", "requests_per_s", _per_second)],
    ]
    return table(["", "stock vLLM, prefix cache on", "sculpted"], rows)


def reuse() -> str:
    """All of it."""
    found = _reused(REUSE[0])
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
        found = _reused(name)
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


def answers() -> str:
    """Throughput by the length of answers, with memory short and with plenty."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for row in _reused("answers-smollm2-135m-cpu.json")["answers"]:
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


def flags() -> str:
    """One row a setting."""
    from kvsculpt_vllm.config import SERVER_ONLY, CompressionConfig, choices, flag, request_key

    body = []
    for field, info in CompressionConfig.model_fields.items():
        by_request = "–" if field in SERVER_ONLY else f"`{request_key(field)}`"
        options = ", ".join(f"`{option}`" for option in choices(field))
        meaning = f"One of {options}. {info.description}" if options else info.description
        body.append([f"`{flag(field)}`", by_request, f"`{info.default}`", meaning])
    return table(["flag", "in a request's `vllm_xargs`", "default", "meaning"], body)


def efforts() -> str:
    """What a fit may take."""
    from kvsculpt_vllm.sculpt.effort import EFFORTS

    header = ["effort", "positions that rank entries, at least", "positions a pilot is fitted to",
              "positions a fit uses", "key steps, at most"]  # fmt: skip
    return table(
        header,
        [
            [f"`{name}`", *(f"{n:,}" for n in (e.positions, e.pilot_positions, e.fit_positions, e.key_steps))]
            for name, e in EFFORTS.items()
        ],
    )


def refusals() -> str:
    """What a configuration can be refused for."""
    from kvsculpt_vllm.engine.startup.refusals import known_refusals

    return table(["refused at start-up", "because", "cure"], known_refusals())


def zoo() -> str:
    """Architectures that the tests run, and what becomes of each."""
    models = _module(ROOT / "tests" / "helpers" / "zoo.py").ZOO
    return table(["model", "in particular", "with compression"], map(_model, models))


def _model(model: Any) -> list[str]:
    told = f"refused: {model.refused}" if model.refused else "exact"
    return [f"{model.name} (`{model.architecture}`)", model.particular, told]


def outcomes() -> str:
    """What can become of a prompt."""
    from kvsculpt_vllm.engine.shared.reasons import Outcome

    return table(["outcome", "meaning"], [[f"`{outcome}`", outcome.meaning] for outcome in Outcome])


def reasons() -> str:
    """Why, one row a reason."""
    from kvsculpt_vllm.engine.shared.reasons import Reason

    body = [[f"`{reason}`", reason.outcome, reason.meaning] for reason in Reason]
    return table(["reason", "outcome", "meaning"], body)


def metrics() -> str:
    """What `/metrics` shows besides vLLM's own."""
    from kvsculpt_vllm.engine.shared.commands import Deferred, Settled
    from kvsculpt_vllm.engine.shared.ledger import Ledger
    from kvsculpt_vllm.engine.shared.reasons import Outcome, Reason
    from kvsculpt_vllm.serving.metrics import StatsCollector
    from kvsculpt_vllm.store.background import BackgroundStore
    from kvsculpt_vllm.store.store import Store

    store = BackgroundStore(Store(str(ROOT), None, False), patience_s=1)  # nothing of it is looked at
    ledger = Ledger(block_bytes=1, store=store)  # one of each, so that every label shows
    ledger.hear(Settled("request", 1, Outcome.SKIPPED, Reason.OFF))
    ledger.hear(Deferred("request", 1, Reason.NO_FREE_BLOCKS))
    collector = StatsCollector(SimpleNamespace(age=0.0, stats=[ledger.stats()]), math.inf)
    body = []
    for family in collector.collect():
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels)
        name = family.name + ("_total" if family.type == "counter" else "")
        body.append([f"`{name}`", family.type, ", ".join(label for label in labels if label != "le"),
                     family.documentation])  # fmt: skip
    return table(["metric", "type", "labels", "meaning"], body)


class Shape(NamedTuple):
    """What a model's KV cache depends on, from its config.json."""

    model: str
    layers: int
    heads: int  # KV heads
    head_size: int


SHAPES = (Shape("SmolLM2-135M", 30, 3, 64), Shape("Qwen2.5-1.5B", 28, 2, 128), Shape("Llama-3.1-8B", 32, 8, 128))


def store_sizes(keep_ratio: float = 0.3) -> str:
    """What a store takes for some models, in 16 bits."""
    body = []
    for shape in SHAPES:
        exact = shape.layers * shape.heads * shape.head_size * 2 * 2
        packed = keep_ratio * exact
        body.append([shape.model, f"{shape.layers} × {shape.heads} × {shape.head_size}", f"{exact / 1000:.1f} kB",
                     f"{packed / 1000:.1f} kB", f"{packed * 10_000 / 1e6:.0f} MB",
                     f"{100 * 2**30 / packed / 1e6:.1f} million tokens"])  # fmt: skip
    header = ["", "layers × KV heads × head size", "a token, exact", "a token, stored", "a document of 10,000 tokens",
              "100 GiB hold"]  # fmt: skip
    return table(header, body)


def working_memory() -> str:
    """What a GPU worker keeps free for compression, by the estimate that it makes at its start."""
    from kvsculpt_vllm.config import CompressionConfig
    from kvsculpt_vllm.engine.shared.rank_shape import RankShape
    from kvsculpt_vllm.engine.worker.working_memory import reserved

    lengths = (8_192, 32_768, 131_072)
    ranks = {
        "Qwen2.5-1.5B": RankShape(28, 2, 12, 128, 2),
        "Llama-3.1-8B": RankShape(32, 8, 32, 128, 2),
        "Llama-3.1-70B, each of 8 GPUs": RankShape(80, 1, 8, 128, 2),
    }
    body = []
    for name, rank in ranks.items():
        parts = [reserved(rank, CompressionConfig(), length) for length in lengths]
        heads = f"{rank.num_layers} × {rank.num_query_heads} × {rank.num_kv_heads} × {rank.head_size}"
        body.append([name, heads, _gibibytes(parts[0].samples), *(_gibibytes(part.total) for part in parts)])
    header = ["", "layers × query heads × KV heads × head size", "of which queries"]
    return table(header + [f"`--max-model-len {length}`" for length in lengths], body)


@cache
def gpu() -> dict[str, dict[str, Any]]:
    """What each step of `benchmarks/gpu_day.sh` found on the H100."""
    record = json.loads((RESULTS / "gpu" / "nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))
    return {name: step["result"] for name, step in record["steps"].items()}


def gpu_small() -> str:
    """Decoding on a GPU, for the README."""
    body = []
    for tokens, batch in ((32768, 16), (8192, 64), (8192, 16)):
        flash, *ours = (_decoding(tokens, batch, system) for system in ("FlashAttention 3", *_OURS))
        body.append([f"{tokens:,} × {batch}", _milliseconds(flash), *(_beside(one, flash) for one in ours)])
    return table(["tokens × requests", "FlashAttention 3, full cache", "keep 1", "keep 0.3", "keep 0.1"], body)


_OURS = tuple(f"paged_attention, keep {keep}" for keep in (1, 0.3, 0.1))


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


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


TABLES: dict[str, Callable[[], str]] = {
    "quality-small": quality_small,
    "quality-smollm2": lambda: quality(SMOLLM, "SmolLM2-135M", MAIN),
    "quality-qwen": lambda: quality(QWEN, "Qwen2.5-Coder-1.5B", MAIN),
    "quality-lead": quality_lead,
    "held-out": held_out,
    "quality-smollm2-by-text": lambda: quality_by_text(SMOLLM, "SmolLM2-135M"),
    "quality-qwen-by-text": lambda: quality_by_text(QWEN, "Qwen2.5-Coder-1.5B"),
    "uniform-smollm2": lambda: quality(SMOLLM, "SmolLM2-135M", UNIFORM),
    "uniform-qwen": lambda: quality(QWEN, "Qwen2.5-Coder-1.5B", UNIFORM),
    "segments": segments,
    "retrieval": retrieval,
    "tasks-scores": lambda: tasks("tasks-scores"),
    "tasks-wins": lambda: tasks("tasks-wins"),
    "tasks-leakage": lambda: tasks("tasks-leakage"),
    "tasks-turns": lambda: tasks("tasks-turns"),
    "bound-correlation": lambda: of_benchmark("bound.py", "correlation"),
    "bound-kept": lambda: of_benchmark("bound.py", "bounds"),
    "chains-answers": lambda: of_benchmark("chains.py", "answers"),
    "chains-afar": lambda: of_benchmark("chains.py", "afar"),
    "fp8": lambda: of_benchmark("fp8.py"),
    "paper": paper,
    "cost-small": cost_small,
    "cost": cost,
    "sharing": sharing,
    "answers": answers,
    "reuse-small": reuse_small,
    "reuse": reuse,
    "reuse-pays": reuse_pays,
    "flags": flags,
    "efforts": efforts,
    "refusals": refusals,
    "zoo": zoo,
    "store-sizes": store_sizes,
    "working-memory": working_memory,
    "gpu-small": gpu_small,
    "gpu-decode": gpu_decode,
    "outcomes": outcomes,
    "reasons": reasons,
    "metrics": metrics,
}
"""What can stand between markers."""


def main() -> None:
    """Write every document that has changed."""
    for path in documents():
        before = path.read_text(encoding="utf-8")
        after = renewed(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: tables rewritten")


if __name__ == "__main__":
    main()
