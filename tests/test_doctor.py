"""`kvsculpt doctor` without a server: what it finds well here, and what it tells when something is not."""

import pytest
from typer.testing import CliRunner

from kvsculpt_vllm import doctor, plugin
from kvsculpt_vllm.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_everything_is_well_here_and_the_solver_beats_selection():
    result = run("--refusals")
    assert result.exit_code == 0, result.output
    assert "BAD" not in result.output
    assert "self-test: 2 heads sculpted to a quarter" in result.output
    assert "speculative decoding" in result.output


def test_a_plugin_that_is_filtered_out_is_found(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    result = run()
    assert result.exit_code == 1
    assert "VLLM_PLUGINS is 'another', which leaves it out" in result.output


def test_a_vllm_that_is_left_alone_is_told_with_the_cure_and_does_not_end_the_other_checks(monkeypatch):
    monkeypatch.setattr(plugin, "installed_vllm", lambda: "0.34.0")
    result = run("--model", "some/model")
    assert result.exit_code == 1
    assert "vLLM's version: kvsculpt-vllm needs vLLM >=0.32,<0.34, found 0.34.0. Install it with" in result.output
    assert "self-test: 2 heads sculpted to a quarter" in result.output


def test_a_solver_that_says_something_else_than_float64_is_found(monkeypatch):
    stock = doctor.compress

    def flattering(*args):
        done = stock(*args)
        done.error *= 0.5
        return done

    monkeypatch.setattr(doctor, "compress", flattering)
    (finding,) = [finding for finding in doctor.examine(None, None, None) if finding.name == "self-test"]
    assert finding.good is False and "please report this" in finding.detail


def test_a_check_that_breaks_does_not_end_the_others(monkeypatch):
    def broken():
        raise ModuleNotFoundError("No module named 'vllm'")

    monkeypatch.setattr(doctor, "_flags", broken)
    findings = {finding.name: finding for finding in doctor.examine(None, None, None)}
    assert findings["flags"].good is False and "No module named 'vllm'" in findings["flags"].detail
    assert findings["self-test"].good is True


@pytest.mark.parametrize("layout", ["BLNHC", "NHDC"])
def test_a_layout_that_would_be_refused_is_found(monkeypatch, layout):
    monkeypatch.setattr("kvsculpt_vllm.engine.startup.refusals.requested_layout", lambda: layout)
    (finding,) = [finding for finding in doctor.examine(None, None, None) if finding.name == "environment"]
    assert finding.good is False and layout in finding.detail


def test_a_server_that_does_not_answer_is_found():
    (finding,) = [f for f in doctor.examine(None, "http://127.0.0.1:9", None) if f.name.startswith("server")]
    assert finding.good is False and "no answer" in finding.detail
