"""`kvsculpt doctor` without a server: what it finds well here, and what it tells when something is not."""

import pytest
from typer.testing import CliRunner
from vllm.plugins import load_general_plugins

from kvsculpt_vllm import doctor, plugin
from kvsculpt_vllm.cli import app
from zoo import EXPERTS, Model


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_everything_is_well_here_and_the_solver_beats_selection():
    result = run("--refusals")
    assert result.exit_code == 0, result.output
    assert "BAD" not in result.output
    assert "self-test: 2 heads sculpted to a quarter" in result.output
    assert "speculative decoding" in result.output


LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
SHORT = {"max_position_embeddings": 8192, "vocab_size": 128256}
MODELS = {
    "70 billion weights": (
        Model("", "", "LlamaForCausalLM", "llama", {**LARGE, **SHORT, "num_hidden_layers": 80}),
        "not refused, 80 layers tried",
    ),
    "200 billion weights of experts": (
        Model("", "", "Qwen3MoeForCausalLM", "qwen3_moe", LARGE | SHORT | EXPERTS
              | {"num_experts": 128, "moe_intermediate_size": 4096, "head_dim": 128, "num_hidden_layers": 16}),
        "not refused, 16 layers tried",
    ),
    "quantised weights": (
        Model("", "", "LlamaForCausalLM", "llama", LARGE | SHORT
              | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}}),
        "not refused, 4 layers tried",
    ),
    "queries that grow with their position": (
        Model("", "", "Ministral3ForCausalLM", "ministral3", LARGE | SHORT
              | {"head_dim": 128, "llama_4_scaling": {"original_max_position_embeddings": 1024, "beta": 0.1}}),
        "refused: positions of model.layers.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_any_size_is_judged_by_its_configuration_alone(monkeypatch, tmp_path, name):
    # vLLM looks at an architecture's class in a process of its own, which takes longer than the rest.
    monkeypatch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda inspect: inspect())
    load_general_plugins()
    model, told = MODELS[name]
    directory = str(model.write(tmp_path))
    if told.startswith("refused"):
        with pytest.raises(doctor.Trouble, match=told):
            doctor.judge(directory)
    else:
        assert doctor.judge(directory).startswith(told)


def test_a_model_is_judged_as_it_would_be_served_with_the_flags_behind_the_dashes(tmp_path):
    windowed = Model("", "", "MistralForCausalLM", "mistral", {"sliding_window": 256}).write(tmp_path)
    refused = run("--model", str(windowed))
    assert refused.exit_code == 1 and "refused: sliding-window models" in refused.output
    short = run("--model", str(windowed), "--", "--max-model-len", "256")
    assert short.exit_code == 0 and "not refused, 4 layers tried" in short.output, short.output


def test_a_model_that_cannot_be_tried_without_weights_is_not_called_good(monkeypatch, tmp_path):
    def broken(config):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("kvsculpt_vllm.engine.worker.rehearsal.rehearse", broken)
    load_general_plugins()
    with pytest.raises(doctor.Trouble, match=r"not refused, and its layers could not be tried .*no such kernel"):
        doctor.judge(str(Model("", "", "LlamaForCausalLM", "llama", {}).write(tmp_path)))


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
    monkeypatch.setattr("kvsculpt_vllm.engine.startup.refusals.cache.requested_layout", lambda: layout)
    (finding,) = [finding for finding in doctor.examine(None, None, None) if finding.name == "environment"]
    assert finding.good is False and layout in finding.detail


def test_a_server_that_does_not_answer_is_found():
    (finding,) = [f for f in doctor.examine(None, "http://127.0.0.1:9", None) if f.name.startswith("server")]
    assert finding.good is False and "no answer" in finding.detail
