"""What a fit is told of the softmax of a rank's attention layers."""

from types import SimpleNamespace

import torch

from kvsculpt_vllm.engine.worker.softmax import sink_logits_of, soft_cap_of

CPU = torch.device("cpu")


def test_learned_sinks_are_asked_of_the_weights_and_a_layer_without_them_has_none():
    weights = torch.nn.Parameter(torch.tensor([1.5, -2.0, 0.25]).bfloat16())
    impls = [SimpleNamespace(sinks=weights), SimpleNamespace(), SimpleNamespace(sinks=None)]
    nothing = [-torch.inf] * 3
    found = sink_logits_of(impls, 3, CPU)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert found.tolist() == [[1.5, -2.0, 0.25], nothing, nothing]
    weights.data.fill_(4.0)  # as when a server's weights are replaced
    assert sink_logits_of(impls, 3, CPU).tolist() == [[4.0] * 3, nothing, nothing]
    assert sink_logits_of(impls[1:], 3, CPU) is None


def test_a_soft_cap_of_0_is_none():
    caps = [soft_cap_of(SimpleNamespace(**given)) for given in ({"logits_soft_cap": 30.0}, {"logits_soft_cap": 0}, {})]
    assert caps == [30.0, None, None]
