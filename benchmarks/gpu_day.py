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
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from gpu_steps import STEPS, TARGETS, Step, Target

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
BOUND_MINUTES = 25
GRACE = 15  # seconds of a step's bound in which it may tidy up after itself
SLOWER = 4  # times as long as on the day a rehearsal may take
REHEARSAL = "rehearsal"  # in the place of a device's name
TAIL = 40  # lines of a failed step that are kept
CODE = ("kernels", "kvsculpt_vllm", "benchmarks", "tests/kernels", "tests/helpers", "tests/engine/engine_job.py")

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
