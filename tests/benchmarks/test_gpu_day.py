"""The first day on a GPU, rehearsed on a CPU: what is cheap is run, and of the rest the command lines are parsed."""

import importlib.util
import inspect
import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
import torch
import typer

from kvsculpt_vllm import cli

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@cache
def benchmark(name):
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def imported(name):
    """A file that others in benchmarks/ import, by the name that it has for them."""
    sys.modules[name] = module = benchmark(name)
    return module


gpu_steps, kernel_cases = imported("gpu_steps"), imported("kernel_cases")
gpu_day = benchmark("gpu_day")
STEPS = {step.name: step for step in gpu_steps.STEPS}
REHEARSED = ("selftest", "kernel-tests", "kernels", "solver")
"""Steps that take seconds on a CPU. Their options and those of all others are looked at below."""


def test_the_day_is_over_in_less_than_25_minutes():
    assert sum(step.seconds for step in gpu_steps.STEPS) <= 25 * 60
    assert max(step.seconds for step in gpu_steps.STEPS) < 10 * 60 - 60  # a lent machine takes commands of ten minutes


# --- command lines


@pytest.mark.parametrize("rehearse", [False, True], ids=["on a GPU", "rehearsed"])
@pytest.mark.parametrize("name", STEPS)
def test_every_program_understands_its_options(name, rehearse):
    _, *words = STEPS[name].command("some-model", rehearse)
    if words[:2] == ["-m", "pytest"]:
        paths = [word for word in words[2:] if word.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths)
    elif words[0] == "-c":
        assert words[1] == "from kvsculpt_vllm.cli import main; main()" and callable(cli.main)
        command = typer.main.get_command(cli.app).commands[words[2]]
        command.make_context(words[2], words[3:])
    else:
        parsed(Path(words[0]).stem, words[1:])


def parsed(name, words):
    """The options of a benchmark, and what it looks at only when it runs."""
    module, app = benchmark(name), typer.Typer()
    app.command()(module.main)
    options = typer.main.get_command(app).make_context(name, list(words)).params
    if "parts" in options:
        assert set(options["parts"].split(",")) <= set(module.PARTS)
    if name == "solver":
        assert options["shape"] in module.SHAPES and options["effort"] in module.EFFORTS
    if "device" in options:
        assert options["device"] in ("cpu", "cuda")
    return options


def test_an_option_that_a_program_does_not_have_is_found():
    with pytest.raises(Exception, match=r"No such option.*--concurency"):
        parsed("serving", ["--concurency", "16"])


# --- the rehearsal


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Runs the script: its exit code, its JSON line, and the folder of what it found."""
    out = tmp_path_factory.mktemp("day")

    def run(*words):
        command = ["bash", str(BENCHMARKS / "gpu_day.sh"), "--rehearse", "--out", str(out), *words]
        environment = {**os.environ, "PYTHON": sys.executable}
        environment.pop("TRITON_INTERPRET", None)  # a step says itself what it needs
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        return done.returncode, json.loads(done.stdout), out

    return run


def test_what_is_cheap_runs_and_is_not_run_again(rehearsal):
    code, line, out = rehearsal(*(word for name in REHEARSED for word in ("--only", name)))
    page = (out / "rehearsal.md").read_text()
    assert code == 0 and {name: line["steps"][name] for name in REHEARSED} == dict.fromkeys(REHEARSED, "done"), page
    for figure in (r"comparisons, 0 failed", " passed", "BLHNC, 2 layers, paged_attention, keep 0.3", "as an engine"):
        assert figure in page
    assert set(line["targets"].values()) == {None}  # times of a rehearsal say nothing
    records = json.loads((out / "rehearsal.json").read_text())["steps"]
    assert records["kernels"]["result"]["targets"].keys() == {"LBHNC", "BLHNC"}
    assert all(records[name]["machine"]["torch"] == torch.__version__ for name in REHEARSED)

    code, line, _ = rehearsal("--minutes", "0")  # nothing is begun, and what is done is not asked for
    assert code == 1 and line["left_over"] == [name for name in STEPS if name not in REHEARSED]
    assert all(line["steps"][name] == "done" for name in REHEARSED)


# --- steps that go wrong


def python(name, source, seconds=60, **more):
    """A step that runs some Python."""
    return gpu_steps.Step(name, "a test", seconds, ("-c", source), (), (), lambda result: iter([f"{result}"]), **more)


@pytest.fixture
def day(tmp_path, monkeypatch):
    """Runs steps as a day's: what is told at the end, and the page."""
    monkeypatch.setattr(gpu_day, "facts", lambda: {"device": "H100", "torch": "2"})

    def run(*steps, minutes=25.0):
        monkeypatch.setattr(gpu_day, "STEPS", steps)
        told = []
        monkeypatch.setattr(
            gpu_day.typer, "echo", lambda text, err=False: None if err else told.append(json.loads(text))
        )
        with pytest.raises(typer.Exit) as ended:
            gpu_day.main(out=tmp_path, model="model", minutes=minutes, only=None, rehearse=False)
        (line,) = told
        return ended.value.exit_code, line, (tmp_path / "h100.md").read_text()

    return run


def test_a_step_that_fails_is_told_and_the_others_go_on(day):
    broken = python("broken", "import sys; print('so far'); sys.exit('it broke')")
    silent = python("silent", "print('no figures')")
    good = python("good", "print('words'); print('{\"x\": 7}')")
    code, line, page = day(broken, silent, good)
    assert code == 1 and line["steps"] == {"broken": "failed", "silent": "failed", "good": "done"}
    assert "failed, exit code 1" in page and "it broke" in page and "- {'x': 7}" in page


def test_a_step_that_failed_comes_after_those_that_were_never_tried(day, tmp_path):
    mark = tmp_path / "order"
    source = "import sys; open({!r}, 'a').write({!r}); print('{{}}'); sys.exit({})".format

    def steps(code):
        return [python(name, source(str(mark), name, code if name == "a" else 0)) for name in "abc"]

    day(*steps(1)[:2])
    day(*steps(1))  # b is done, and c was never tried
    assert mark.read_text() == "abca"
    code, line, _ = day(*steps(0)[:1], minutes=0)
    assert code == 1 and line["left_over"] == ["a"]


def test_what_the_same_code_has_done_is_done_and_other_code_has_done_nothing(day, monkeypatch):
    step = python("step", "import time; print('{\"at\": %s}' % time.time())")
    pages = [day(step)[2] for _ in range(2)]
    assert pages[0] == pages[1]
    monkeypatch.setattr(gpu_day, "code_hash", lambda: "other")
    assert day(step, minutes=0)[1]["steps"] == {"step": "not run"}
    assert day(step)[2] != pages[0]


def test_a_step_ends_in_time_with_all_that_it_has_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "GRACE", 1)
    note = tmp_path / "pid"
    child = [sys.executable, "-c", "import time; time.sleep(600)"]
    source = (
        f"import subprocess, time; p = subprocess.Popen({child!r}, start_new_session=True);"
        f"open({str(note)!r}, 'w').write(str(p.pid)); print('started', flush=True); time.sleep(600)"
    )
    begin = time.monotonic()
    command = [sys.executable, "-c", source]
    code, printed = gpu_day.run_bounded(command, os.environ, tmp_path / "log", 10)
    assert code is None and printed == "started\n" and time.monotonic() - begin < 20
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text()  # it could have tidied up
    pid = int(note.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_without_a_gpu_it_says_how_to_rehearse(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_day, "facts", lambda: {"device": None})
    with pytest.raises(SystemExit, match=r"no CUDA device.*--rehearse"):
        gpu_day.main(out=tmp_path, model="model", minutes=25, only=None, rehearse=False)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"places": [str(ROOT / "kvsculpt_vllm"), None]}, r"not this checkout's: `pip install -e \.`"),
        ({"places": ["/elsewhere/kvsculpt_vllm", "/elsewhere/kernels"]}, "/elsewhere/kvsculpt_vllm"),
        ({"places": [str(ROOT / "kvsculpt_vllm"), str(ROOT / "kernels")], "plugin": False}, "not installed"),
    ],
    ids=["without kernels", "another one", "without its entry point"],
)
def test_only_this_checkout_is_measured(told, why, monkeypatch):
    answer = SimpleNamespace(returncode=0, stdout=json.dumps(told))
    monkeypatch.setattr(gpu_day.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(SystemExit, match=why):
        gpu_day.facts()


# --- figures


def record(step, result, device="H100"):
    """A step's record as `Day.run` writes it."""
    same = {"state": "done", "exit": 0, "seconds": 1.0, "bound": 9, "command": "python", "commit": "abc", "code": "def"}
    return {step: {**same, "machine": {"device": device}, "result": result}}


def test_targets_are_judged_by_what_was_measured():
    kernels = benchmark("kernels")
    numbers = dict(zip(kernels.TARGETS, (2.6, 0.7, 0.95), strict=True))
    results = {
        "targets": dict.fromkeys(kernels.LAYOUTS, numbers),
        "attention": [],
        "attention_loss": [],
        "copy_bytes_per_second": 2.9e12,
    }
    page = gpu_day.page({"device": "H100"}, "def", record("kernels", results))
    of_kernels = [target for target in gpu_steps.TARGETS if target.step == "kernels"]
    assert {target.what.partition(": ")[2]: target.least for target in of_kernels} == kernels.TARGETS
    assert page.count("| yes |") == 4 and page.count("| **no** |") == 2 and "at least 0.8 | 0.7 |" in page
    stale = gpu_day.page({"device": "H100"}, "other", record("kernels", results))
    assert "done, by other code or versions" in stale and stale.count("| not measured |") == len(gpu_steps.TARGETS)


def rows_of_attention(layout, times):
    """Rows of `kernels.py` at 32k × 16; times in milliseconds."""
    same = {"tokens": 32768, "batch": 16, "layers": 32, "layout": layout, "of_copy": 0.5}
    return [{**same, "system": system, "seconds": time / 1e3} for system, time in times.items()]


def test_each_layout_is_compared_with_flash_attention_on_the_same_layout():
    systems = "paged_attention, keep 1", "paged_attention, keep 0.3", "FlashAttention 3"
    rows = rows_of_attention("LBHNC", dict(zip(systems, (0.8, 0.25, 0.75), strict=True)))
    rows += rows_of_attention("BLHNC", dict(zip(systems, (0.7, 0.2, 0.7), strict=True)))
    found = benchmark("kernels").verdicts(rows)
    assert [list(figures.values()) for figures in found.values()] == [
        pytest.approx([3.0, 0.5, 0.9375]),
        pytest.approx([3.5, 0.5, 1.0]),
    ]
    assert set(benchmark("kernels").verdicts(rows[:2])["LBHNC"].values()) == {0.5, None}  # without a peer


def test_a_page_has_the_figures_of_serving():
    found = json.loads((BENCHMARKS / "results" / "serving-smollm2-135m-cpu.json").read_text())
    told = list(gpu_steps.of_serving(found))
    held = {row["system"]: row["held_at_once"] for row in found["capacity"]}
    assert any(line.startswith(f"sculpt: {held['sculpt']} of ") for line in told)
    assert len(told) == len(found["capacity"]) + len(found["throughput"]) + 1


def test_a_page_has_the_figures_of_reuse():
    reuse = benchmark("reuse")
    one = reuse.Served(0, 0, first_token=0.5, seconds=1.0, prompt_tokens=100, cached=50, text="")
    slices = [
        reuse.Slice(system, 0, seconds, 0.1, all_seen, [replace(one, first_token=first)])
        for system, seconds, first in (("stock", 2.0, 0.9), ("plugin", 1.0, 0.3))
        for all_seen in (False, True)
    ]
    told = list(gpu_steps.of_reuse({"many": reuse.compared(slices)}))
    assert [line.partition(":")[0] for line in told] == ["in_all", "steady"]
    assert "2.00 times stock's" in told[0] and "3.00 times sooner" in told[0]


def engine_result(tokens, segments):
    """What `engine_job.py` answers, as far as `identity.py` looks at it."""
    told = [{"outcome": "compressed" if n else "skipped", "reason": None, "segments": n} for n in segments]
    return {"tokens": [tokens], "told": [told], "scheduler": "SculptAsyncScheduler"}


@pytest.mark.parametrize(
    ("tokens", "segments", "good"),
    [
        ([[1, 2], [3], [4]], [3, 0, 1], True),
        ([[1, 9], [3], [4]], [3, 0, 1], False),
        ([[1, 2], [3], [4]], [3, 0, 0], False),
    ],
    ids=["equal", "another token", "one that was not compressed"],
)
def test_identity_takes_equal_tokens_and_compressed_prompts(tokens, segments, good):
    row = benchmark("identity").compared(engine_result(tokens, segments), [[1, 2], [3], [4]])
    assert row["as_wanted"] is good
    assert any("4 tokens equal" in line for line in gpu_steps.of_identity({"runners": {"V1": row}}))


def test_identity_on_a_gpu_asks_for_graphs_and_asynchronous_scheduling():
    from vllm import EngineArgs

    identity = benchmark("identity")
    for sync_check in (False, True):
        jobs = identity.jobs("model", "cuda", 600, 48, sync_check)
        assert all(job["cuda"] and not job["engine"]["enforce_eager"] for job in jobs.values())
        assert all(job["engine"]["async_scheduling"] for job in jobs.values())
        for job in jobs.values():
            assert job["engine"].keys() <= inspect.signature(EngineArgs).parameters.keys()


# --- what runs on a GPU only


def test_flash_attention_is_called_as_vllm_calls_it_and_reads_what_our_kernel_reads(monkeypatch):
    """vLLM's function is replaced by one that takes its parameters and attends over the blocks it is given."""
    kernels = benchmark("kernels")
    shape = kernels.Shape(3, 4, 2, 16, 16, torch.float32, SimpleNamespace(type="cuda"))
    on_cpu = replace(shape, device=torch.device("cpu"))
    spec = importlib.util.find_spec("vllm")
    path = Path(spec.submodule_search_locations[0], "vllm_flash_attn", "flash_attn_interface.py")
    spec = importlib.util.spec_from_file_location("flash_attn_interface", path)
    real = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real)  # which only looks for the kernels; the package itself is not imported without them
    called = []

    def attend(**given):
        inspect.signature(real.flash_attn_varlen_func).bind(**given)
        called.append(given)
        for row, length in enumerate(given["seqused_k"].tolist()):
            blocks = given["block_table"][row].long()
            keys, values = (
                given[name][blocks].flatten(0, 1)[:length].repeat_interleave(2, dim=1) for name in ("k", "v")
            )
            logits = torch.einsum("hd,nhd->hn", given["q"][row], keys) * given["softmax_scale"]
            given["out"][row] = torch.einsum("hn,nhd->hd", logits.softmax(-1), values)

    def plan(**given):
        inspect.signature(real.get_scheduler_metadata).bind(**given)
        return "plan"

    stub = ModuleType("vllm.vllm_flash_attn")
    stub.flash_attn_varlen_func, stub.get_scheduler_metadata = attend, plan
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", stub)
    from vllm.v1.attention.backends import fa_utils

    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size: 3)
    make = kernels.Case.make
    monkeypatch.setattr(kernels.Case, "make", lambda given, *others: make(on_cpu, *others))
    buffer = torch.randn(kernels.blocks_for(70, 2, on_cpu) * on_cpu.block_bytes // 4)
    for layout in kernels.LAYOUTS:
        name, run = kernels.flash_attention(shape, kernels.Cache.make(on_cpu, layout, buffer), 70, 2)
        assert name == "FlashAttention 3" and run().shape == (2, 4, 16)
    assert {given["fa_version"] for given in called} == {3} and {given["scheduler_metadata"] for given in called} == {
        "plan"
    }


class BothStarted(Exception):
    """Raised in the place of the second server's start."""


@pytest.mark.parametrize("name", ["serving", "reuse"])
def test_two_servers_share_a_gpu_with_flags_that_vllm_knows(name, monkeypatch):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kvsculpt_vllm.plugin import register

    started = []

    @contextmanager
    def serve(model, *flags):
        started.append(flags)
        if len(started) == 2:
            raise BothStarted
        yield None

    module = benchmark(name)
    monkeypatch.setattr(module, "serve", serve)
    monkeypatch.setattr(module, "find_spec", lambda package: package, raising=False)  # whatever it takes is here
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    _, _, *words = STEPS[name].command("smollm2-135m", rehearse=False)
    with pytest.raises(BothStarted):
        module.main(**parsed(name, words))
    register()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    of_engine = [[flag for flag in flags if flag != "--enable-prompt-tokens-details"] for flags in started]
    stock, plugin = (AsyncEngineArgs.from_cli_args(parser.parse_args(flags)) for flags in of_engine)
    assert stock.gpu_memory_utilization + plugin.gpu_memory_utilization <= 0.9
    assert not plugin.enforce_eager and plugin.additional_config["kv_compression"]["method"] == "sculpt"
    assert "max_stall_ms" not in plugin.additional_config["kv_compression"]  # that is a CPU's
    assert not (stock.additional_config or {}).get("kv_compression")


def test_layers_are_left_out_where_the_memory_does_not_hold_them(monkeypatch):
    kernels = benchmark("kernels")
    llama = kernels.Shape(32, 32, 8, 128, 16, torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (78 << 30, 80 << 30))
    assert kernels.fitting_layers(llama, 32768, 16) == 32  # the target's case, whole
    assert kernels.fitting_layers(llama, 131072, 16) == 9
    assert kernels.fitting_layers(llama, 131072, 256) == 0


def test_the_script_is_thin_and_can_be_run():
    script = BENCHMARKS / "gpu_day.sh"
    assert os.access(script, os.X_OK)
    last = shlex.split(script.read_text().strip().rpartition("\n")[2])
    assert last == ["exec", "${PYTHON:-python3}", "benchmarks/gpu_day.py", "$@"]
