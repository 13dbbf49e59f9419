"""All that is to be known on the first day on a GPU, in steps that each end in time: `benchmarks/gpu_day.sh`.

    benchmarks/gpu_day.sh                                      # all of it, in less than 25 minutes
    benchmarks/gpu_day.sh --minutes 9.5 --out /tmp/day         # what fits; called again, the rest
    benchmarks/gpu_day.sh --only kernels --only solver         # these, also where they are done
    benchmarks/gpu_day.sh --rehearse --out /tmp/rehearsal      # on a CPU: tiny shapes, and times that mean nothing

Every step is a program of its own with a bound on its time, and what it leaves running is ended with it. What it finds
goes into one file for each device, `DEVICE.json`, with versions, commit and a hash of the code; beside it are a page,
`DEVICE.md`, and what the steps have printed, `logs/`. A step that was done by the same code with the same versions on
the same device is not run again. One that failed is kept with the end of what it printed, does not stop the others, and
is tried again after what was never tried. Ends with one JSON line; the exit code is 0 if every step is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
BOUND_MINUTES = 25
GRACE = 15  # seconds of a step's bound in which it may tidy up after itself
SLOWER = 4  # times as long as on the day a rehearsal may take
REHEARSAL = "rehearsal"  # in the place of a device's name
TAIL = 40  # lines of a failed step that are kept
CODE = ("kernels", "kvsculpt_vllm", "benchmarks", "tests/kernels", "tests/helpers", "tests/engine/engine_job.py")
MODEL = "{model}"  # in a step's arguments

# The versions that a result depends on, and the device, from a process that holds nothing of its memory afterwards.
FACTS = """
import json, platform, torch
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
def place(package):
    spec = find_spec(package)
    return spec and list(spec.submodule_search_locations)[0]
def of(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None
gpu = torch.cuda.is_available()
print(json.dumps({"places": [place("kvsculpt_vllm"), place("kvsculpt_vllm.kernels")],
    "plugin": any(one.name == "kvsculpt" for one in entry_points(group="vllm.general_plugins")), "machine": {
    "device": torch.cuda.get_device_name() if gpu else None,
    "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if gpu else None,
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "triton": of("triton"), "vllm": of("vllm")}}))
"""

Read = Callable[[str], "dict[str, Any] | None"]
Figures = Callable[[dict[str, Any]], Iterator[str]]


def last_json(printed: str) -> dict[str, Any] | None:
    """The JSON document that a program's output is, or that its last line is; None if there is none."""
    for text in (printed, printed.strip().rpartition("\n")[2]):
        with suppress(json.JSONDecodeError):
            found = json.loads(text)
            if isinstance(found, dict):
                return found
    return None


def pytest_summary(printed: str) -> dict[str, Any] | None:
    """How many tests passed, failed and were skipped; None if none has passed."""
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", printed)}
    return counts if counts.get("passed") else None


@dataclass(frozen=True)
class Step:
    """One program and the time that it may take."""

    name: str
    what: str  # it does, for people
    seconds: int  # at most, with what it takes to end it
    program: tuple[str, ...]  # Python's arguments
    arguments: tuple[str, ...]  # the program's, on a GPU
    rehearsal: tuple[str, ...]  # the same on a CPU
    figures: Figures
    read: Read = last_json
    interpreted: bool = False  # whether a rehearsal is Triton's interpreter's
    serves: bool = False  # whether it starts vLLM's engine: a rehearsal takes minutes then
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, model: str, rehearse: bool) -> list[str]:
        """The command line."""
        arguments = self.rehearsal if rehearse else self.arguments
        return [sys.executable, *self.program, *(model if word == MODEL else word for word in arguments)]


def of_selftest(result: dict[str, Any]) -> Iterator[str]:
    """Its figures on the page."""
    failed = [one for one in result["measured"] if not one["passed"]]
    yield f"{len(result['measured'])} comparisons, {len(failed)} failed, in {result['seconds']} s"
    yield from (f"FAILED: {one['kernel']}, {one['case']}: off by {one['error']:.3g}" for one in failed[:10])
    yield from (f"left out: {why}" for why in result["left_out"])


def of_tests(result: dict[str, Any]) -> Iterator[str]:
    """Their figures on the page."""
    yield ", ".join(f"{count} {what}" for what, count in result.items())


def of_kernels(result: dict[str, Any]) -> Iterator[str]:
    """The figures of `kernels.py` on the page."""
    yield f"copy: {result['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    for row in result["attention"]:
        yield (
            f"{row['tokens']} tokens × {row['batch']}, {row['layout'] or 'dense'}, {row['layers']} layers, "
            f"{row['system']}: {row['seconds'] * 1e3:.3f} ms, {row['of_copy']:.2f} of copy's bytes/s"
        )
    for row in result["attention_loss"]:
        yield (
            f"loss and gradient of {row['batch']} problems, {row['queries']} × {row['entries']}: "
            f"{row['seconds'] * 1e3:.3g} ms, {row['flop_per_second'] / 1e12:.3g} TFLOP/s"
        )


def of_solver(result: dict[str, Any]) -> Iterator[str]:
    """The figures of `solver.py` on the page."""
    runs = ", ".join(f"{seconds:.3f}" for seconds in result["segment_runs"])
    yield f"a segment as an engine makes it: median {result['segment_seconds']:.3f} s of {runs}"
    if result["segment_peak_bytes"] is not None:
        yield f"memory that it takes: {result['segment_peak_bytes'] / 2**30:.2f} GiB"
    yield f"with a pilot and all problems at once: {result['seconds']:.3f} s"
    if "whole_ratio" in result:
        yield f"times faster than torch.optim.LBFGS head by head: {result['whole_ratio']['held_out']}"


def of_identity(result: dict[str, Any]) -> Iterator[str]:
    """The figures of `identity.py` on the page."""
    for runner, row in result["runners"].items():
        told = f"{row['equal']} of {row['tokens']} tokens equal" if "equal" in row else "tokens not compared"
        yield f"{runner}, {row['scheduler']}: {told}; {', '.join(row['outcomes'])}; segments {row['segments']}"


def of_serving(result: dict[str, Any]) -> Iterator[str]:
    """The figures of `serving.py` on the page."""
    for row in result["capacity"]:
        held = f"{row['held_at_once']} of {row['arrived']} held at once"
        yield f"{row['system']}: {held}, {row['preemptions']} preemptions"
    for row in result["throughput"]:
        yield (
            f"{row['system']}, {row['concurrency']} at a time: {row['output_throughput']:.1f} tokens/s, first token "
            f"{row['median_ttft_ms'] / 1000:.3f} s, then {row['median_tpot_ms']:.1f} ms each (medians)"
        )
    if "none_over_stock" in result:
        yield f"every request `none`, against stock: {result['none_over_stock']:.2f} of its tokens/s"


def of_reuse(result: dict[str, Any]) -> Iterator[str]:
    """The figures of `reuse.py` on the page."""
    for when, both in result["many"].items():
        yield (
            f"{when}: {both['plugin']['requests_per_s']:.2f} requests/s, {both['requests_ratio']:.2f} times stock's; "
            f"first token {both['first_token_ratio']:.2f} times sooner"
        )


KVSCULPT = ("-c", "from kvsculpt_vllm.cli import main; main()")
TINY_TEST = ("--layers", "2", "--heads", "2", "--kv-heads", "1", "--head-size", "16", "--dtype", "float32")

STEPS = (
    Step(
        "selftest",
        "kernels against their twins, vLLM's and float64, as a server does at its start (Llama-3.1-8B's numbers)",
        60,
        KVSCULPT,
        ("selftest", "--json", "--layers", "32"),
        ("selftest", "--json", *TINY_TEST),
        of_selftest,
        interpreted=True,
    ),
    Step(
        "selftest-blhnc",
        "the same in the other layout, with Qwen2.5-1.5B's numbers",
        45,
        KVSCULPT,
        (*("selftest", "--json", "--layout", "BLHNC", "--layers", "28"), *("--heads", "12", "--kv-heads", "2")),
        ("selftest", "--json", "--layout", "BLHNC", *TINY_TEST),
        of_selftest,
        interpreted=True,
    ),
    Step(
        "kernel-tests",
        "the tests of kernels, compiled",
        135,
        ("-m", "pytest"),
        ("-q", "-p", "no:cacheprovider", "tests/kernels"),
        ("-q", "-p", "no:cacheprovider", "tests/kernels/test_dispatch.py", "tests/kernels/test_pages.py"),
        of_tests,
        read=pytest_summary,
        interpreted=True,
    ),
    Step(
        "kernels",
        "decoding against FlashAttention as vLLM uses it, in both layouts, and the solver's loss",
        180,
        ("benchmarks/kernels.py",),
        (
            *("--tokens", "32768", "--tokens", "8192", "--batch", "16", "--batch", "1", "--batch", "64"),
            *("--keep-ratio", "1", "--keep-ratio", "0.3", "--keep-ratio", "0.1"),
        ),
        (
            *("--tokens", "96", "--batch", "2", "--keep-ratio", "0.3", "--segments", "1"),
            *("--query-heads", "4", "--kv-heads", "2", "--head-size", "16"),
        ),
        of_kernels,
        interpreted=True,
    ),
    Step(
        "solver",
        "a segment of 2,048 tokens and its window, in Qwen2.5-1.5B's shape",
        90,
        ("benchmarks/solver.py",),
        ("--shape", "qwen2.5-1.5b", "--context", "2112", "--device", "cuda", "--every", "14"),
        ("--shape", "tiny", "--context", "320", "--effort", "fast", "--every", "2", "--runs", "1"),
        of_solver,
    ),
    Step(
        "identity",
        "tokens of stock vLLM where every entry is kept: graphs, asynchronous scheduling, both model runners",
        300,
        ("benchmarks/identity.py",),
        ("--model", MODEL, "--device", "cuda"),
        ("--model", MODEL, "--device", "cpu", "--prompt", "256", "--answer", "8"),
        of_identity,
        serves=True,
    ),
    Step(
        "sync-check",
        "real compressions while vLLM looks for waits inside its steps (VLLM_GPU_SYNC_CHECK=error)",
        180,
        ("benchmarks/identity.py",),
        ("--model", MODEL, "--device", "cuda", "--sync-check"),
        ("--model", MODEL, "--device", "cpu", "--sync-check", "--prompt", "256", "--answer", "8"),
        of_identity,
        serves=True,
    ),
    Step(
        "serving",
        "capacity and throughput beside stock vLLM at the same KV memory",
        270,
        ("benchmarks/serving.py",),
        (
            *("--model", MODEL, "--device", "cuda", "--dtype", "bfloat16", "--parts", "capacity,throughput"),
            *("--rounds", "1", "--concurrency", "16"),
        ),
        (
            *("--model", MODEL, "--parts", "capacity,throughput", "--rounds", "1", "--concurrency", "2"),
            *("--sequences", "2", "--prompt-tokens", "600", "--output-tokens", "8"),
        ),
        of_serving,
        serves=True,
    ),
    Step(
        "reuse",
        "questions about documents, more than the memory holds exactly, beside stock vLLM",
        240,
        ("benchmarks/reuse.py",),
        (
            *("--model", MODEL, "--device", "cuda", "--dtype", "bfloat16", "--parts", "many"),
            *("--documents", "16", "--questions", "4", "--room", "6"),
        ),
        (
            *("--model", MODEL, "--parts", "many", "--documents", "2", "--questions", "1", "--room", "2"),
            *("--tokens", "640", "--users", "1", "--answer", "8"),
        ),
        of_reuse,
        serves=True,
    ),
)
"""In the order in which they are run: what later figures depend on comes first."""


@dataclass(frozen=True)
class Target:
    """A figure that was set before it was measured, for an H100."""

    what: str
    step: str  # that measures it
    value: Callable[[dict[str, Any]], float | None]
    least: float | None = None
    most: float | None = None

    def told(self) -> str:
        """What the figure is to be."""
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"

    def met(self, value: float) -> bool:
        """Whether it is."""
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)


def _of_layout(layout: str, name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda result: result["targets"][layout][name]


TARGETS = (
    *(
        Target(f"decoding, 32k × 16, {layout}: {name}", "kernels", _of_layout(layout, name), least=least)
        for layout in ("LBHNC", "BLHNC")
        for name, least in (
            ("times faster than FlashAttention at keep 0.3", 2.5),
            ("share of a copy's bandwidth at keep 0.3", 0.8),
            ("times faster than FlashAttention at keep 1", 0.9),
        )
    ),
    Target("a segment of Qwen2.5-1.5B, seconds", "solver", lambda result: result["segment_seconds"], most=0.2),
)


class Day:
    """What was found so far, and where it is kept."""

    def __init__(self, out: Path, machine: dict[str, Any], commit: str | None, code: str) -> None:
        self.machine, self.commit, self.code, self._out = machine, commit, code, out
        name = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
        self.file, self.page, self.logs = out / f"{name}.json", out / f"{name}.md", out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.records: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            self.records = json.loads(self.file.read_text(encoding="utf-8"))["steps"]

    def same(self, name: str) -> bool:
        """Whether a step was tried by this code, on this device with these versions."""
        record = self.records.get(name)
        return record is not None and (record["machine"], record["code"]) == (self.machine, self.code)

    def is_done(self, name: str) -> bool:
        """Whether it was done so, too."""
        return self.same(name) and self.records[name]["state"] == "done"

    def run(self, step: Step, model: str, rehearse: bool) -> dict[str, Any]:
        """Run a step and write down what came of it."""
        command, environment = step.command(model, rehearse), dict(os.environ) | step.environment
        if rehearse and step.interpreted:
            environment["TRITON_INTERPRET"] = "1"
        log, begin = self.logs / f"{step.name}.log", time.monotonic()
        bound = step.seconds * (SLOWER if rehearse else 1)
        code, printed = run_bounded(command, environment, log, bound)
        result = step.read(printed)
        state = "out of time" if code is None else "done" if code == 0 and result is not None else "failed"
        record = {
            "state": state,
            "exit": code,
            "seconds": round(time.monotonic() - begin, 1),
            "bound": bound,
            "command": shlex.join(["python", *command[1:]]),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": self.machine,
            "commit": self.commit,
            "code": self.code,
            "result": result,
        }
        if state != "done":
            record["tail"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        self.records[step.name] = record
        self.write()
        return record

    def write(self) -> None:
        """Write file and page; the file appears complete or not at all."""
        partial = self.file.with_suffix(".partial")
        text = json.dumps({"machine": self.machine, "steps": self.records}, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.file)
        self.page.write_text(page(self.machine, self.code, self.records), encoding="utf-8")


def run_bounded(
    command: list[str], environment: Mapping[str, str], log: Path, seconds: float
) -> tuple[int | None, str]:
    """Run a program for at most so many seconds. All that it prints goes to `log`.

    Returns:
        Its exit code, None if time was over; and what it wrote to its standard output.
    """
    output = log.with_suffix(".out")
    with log.open("w", encoding="utf-8") as errors, output.open("w", encoding="utf-8") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=errors, env=environment, cwd=ROOT)
        try:
            code: int | None = process.wait(max(seconds - GRACE, seconds / 2))
        except subprocess.TimeoutExpired:
            code = None
            _end(process, min(GRACE, seconds / 2))
    text = output.read_text(encoding="utf-8", errors="replace")
    with log.open("a", encoding="utf-8") as both:
        both.write(text)
    output.unlink()
    return code, text


def _end(process: subprocess.Popen[Any], grace: float) -> None:
    """End a program and all that it has started, servers in sessions of their own included."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    process.send_signal(signal.SIGINT)  # so that it tidies up
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    process.kill()
    process.wait()
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(started, timeout=5)  # until then they hold the device's memory


def page(machine: dict[str, Any], code: str, records: dict[str, dict[str, Any]]) -> str:
    """The page of all figures, in Markdown. Targets are judged by what this code has measured with these versions."""
    fresh = {name: one for name, one in records.items() if (one["machine"], one["code"]) == (machine, code)}
    lines = [f"# {machine['device']}", "", "Written by `benchmarks/gpu_day.sh`.", ""]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items() if name != "device"), ""]
    lines += ["| target, for an H100 | to be | measured | met |", "| --- | --- | --- | --- |"]
    for target in TARGETS:
        value = _measured(target, fresh)
        found = ("not measured", "–") if value is None else (f"{value:.3g}", "yes" if target.met(value) else "**no**")
        lines.append(f"| {target.what} | {target.told()} | {found[0]} | {found[1]} |")
    lines += ["", "| step | | seconds | commit |", "| --- | --- | --- | --- |"]
    for step in STEPS:
        if (record := records.get(step.name)) is None:
            lines.append(f"| {step.name} | not run | | |")
        else:
            taken = f"{record['seconds']} of {record['bound']}"
            state = record["state"] + ("" if step.name in fresh else ", by other code or versions")
            lines.append(f"| {step.name} | {state} | {taken} | {record['commit'] or record['code']} |")
    for step in STEPS:
        if (record := records.get(step.name)) is None:
            continue
        lines += ["", f"## {step.name}", "", f"{step.what[0].upper()}{step.what[1:]}: `{record['command']}`", ""]
        if record["machine"] != machine:
            lines += [f"With other versions than above: {json.dumps(record['machine'])}", ""]
        if record["result"] is not None:
            lines += [f"- {figure}" for figure in step.figures(record["result"])]
        if "tail" in record:
            lines += ["", f"{record['state']}, exit code {record['exit']}:", "", "```", *record["tail"], "```"]
    return "\n".join(lines) + "\n"


def _measured(target: Target, records: dict[str, dict[str, Any]]) -> float | None:
    record = records.get(target.step)
    if record is None or record["state"] != "done" or record["machine"]["device"] == REHEARSAL:
        return None
    return target.value(record["result"])


def facts() -> dict[str, Any]:
    """Device and versions here.

    Raises:
        SystemExit: torch is not here, or this checkout is not what Python and vLLM take for the plugin.
    """
    # As the steps find it, and not because it is the current folder.
    found = subprocess.run([sys.executable, "-P", "-c", FACTS], capture_output=True, text=True, cwd=ROOT)
    if found.returncode:
        raise SystemExit(f"gpu_day: torch and the plugin cannot be asked for:\n{found.stderr[-2000:]}")
    told = json.loads(found.stdout.strip().rpartition("\n")[2])
    if [place and Path(place).resolve() for place in told["places"]] != [ROOT / "kvsculpt_vllm", ROOT / "kernels"]:
        raise SystemExit(f"gpu_day: the plugin here is {told['places']}, not this checkout's: `pip install -e .` first")
    if not told["plugin"]:
        raise SystemExit("gpu_day: vLLM would not find the plugin, which is not installed: `pip install -e .` first")
    return told["machine"]


def code_hash() -> str:
    """A hash of all that the steps run."""
    digest = hashlib.sha256()
    for place in CODE:
        files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
        for file in files:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """The commit that is checked out, marked if the code is not as it was committed; None without git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *CODE], cwd=ROOT, capture_output=True)
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("-changed" if changed.returncode else "")


def main(
    out: Annotated[Path, typer.Option(help="A folder for what is found.")] = RESULTS,
    model: Annotated[
        str, typer.Option(help="Of the steps with an engine: a directory, or the name of an embedded one.")
    ] = "smollm2-135m",
    minutes: Annotated[float, typer.Option(min=0, help="No step is begun that might take longer.")] = BOUND_MINUTES,
    only: Annotated[
        list[str] | None, typer.Option(help="A step, done before or not. May be given several times.")
    ] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="On a CPU, with tiny shapes.")] = False,
) -> None:
    """Run what is not done yet, and write the page."""
    names = [step.name for step in STEPS]
    if unknown := set(only or ()) - set(names):
        known = ", ".join(names)
        raise typer.BadParameter(f"got {', '.join(sorted(unknown))}, allowed: {known}", param_hint="--only")
    # A shell's background jobs ignore it, and so would the steps, which are ended by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin, machine = time.monotonic(), facts()
    if rehearse:
        machine |= {"device": REHEARSAL}
        minutes *= SLOWER
    elif machine["device"] is None:
        raise SystemExit("gpu_day: no CUDA device is here; --rehearse runs all steps on a CPU, with tiny shapes")
    day, left_over = Day(out, machine, commit(), code_hash()), []
    wanted = [step for step in STEPS if (step.name in only if only else not day.is_done(step.name))]
    # What has failed before waits for what was never tried.
    for step in sorted(wanted, key=lambda step: day.same(step.name)):
        bound = step.seconds * (SLOWER if rehearse else 1)
        if time.monotonic() - begin + bound > 60 * minutes:
            left_over.append(step.name)
            typer.echo(f"gpu_day: {step.name}: left for the next call, it may take {bound} s", err=True)
            continue
        typer.echo(f"gpu_day: {step.name}: {step.what} …", err=True)
        record = day.run(step, model, rehearse)
        typer.echo(f"gpu_day: {step.name}: {record['state']} in {record['seconds']} s", err=True)
    day.write()
    fresh = {name: record for name, record in day.records.items() if day.same(name)}
    line = {
        "benchmark": "gpu_day",
        **machine,
        "commit": day.commit,
        "steps": {name: fresh[name]["state"] if name in fresh else "not run" for name in names},
        "left_over": left_over,
        "targets": {target.what: _measured(target, fresh) for target in TARGETS},
        "page": str(day.page),
    }
    typer.echo(json.dumps(line))
    raise typer.Exit(0 if all(day.is_done(step.name) for step in wanted) else 1)


if __name__ == "__main__":
    typer.run(main)
