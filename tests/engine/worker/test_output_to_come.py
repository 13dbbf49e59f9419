"""An output that is still being computed goes on to vLLM as another one, which does all that vLLM asks of it."""

from types import SimpleNamespace

from kvsculpt_vllm.engine.compat.worker import OutputToCome


def test_the_finished_output_is_changed_and_what_a_connector_has_told_is_not():
    output = SimpleNamespace(get_output=lambda: ["finished"], get_kv_connector_output=lambda: "told")
    to_come = OutputToCome(output, lambda finished: [*finished, "changed"])
    assert to_come.get_output() == ["finished", "changed"]
    assert to_come.get_kv_connector_output() == "told"
    assert not OutputToCome.__abstractmethods__  # vLLM 0.33 has more of them than 0.32
