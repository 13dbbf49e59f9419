"""What a fit is told of the softmax of a rank's attention layers."""

from types import SimpleNamespace

import torch

from kvsculpt_vllm.engine.worker import attention_triton
from kvsculpt_vllm.engine.worker.softmax import sink_logits_of, soft_cap_of

CPU = torch.device("cpu")


def test_learned_sinks_are_asked_of_the_weights_and_a_layer_without_them_has_none():
    weights = torch.nn.Parameter(torch.tensor([1.5, -2.0, 0.25]).bfloat16())
    impls = [SimpleNamespace(sinks=sinks) for sinks in (weights, None, None)]
    nothing = [-torch.inf] * 3
    found = sink_logits_of(impls, 3, CPU)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert found.tolist() == [[1.5, -2.0, 0.25], nothing, nothing]
    weights.data.fill_(4.0)  # as when a server's weights are replaced
    assert sink_logits_of(impls, 3, CPU).tolist() == [[4.0] * 3, nothing, nothing]
    assert sink_logits_of(impls[1:], 3, CPU) is None


def test_a_soft_cap_of_0_is_none():
    caps = [soft_cap_of(SimpleNamespace(logits_soft_cap=given)) for given in (30.0, 0, None)]
    assert caps == [30.0, None, None]


def test_attention_on_a_gpu_passes_on_what_its_layer_has(monkeypatch):
    given = []
    monkeypatch.setattr(attention_triton, "paged_attention", lambda *arguments: given.append(arguments[-2:]))
    monkeypatch.setattr(attention_triton, "_pages", lambda bound: None)
    weights = torch.nn.Parameter(torch.tensor([1.5, -2.0, 0.25, 0.0]).bfloat16(), requires_grad=False)
    query, step = torch.zeros(3, 4, 64), SimpleNamespace(captures=[], rows=None, plan="made", num_tokens=3)
    for odd in ({"sinks": weights, "logits_soft_cap": 30.0}, {}):
        impl = attention_triton.SculptTritonImpl(4, 64, 0.125, **odd)
        impl.bound = SimpleNamespace(
            index=1, state=SimpleNamespace(directory=SimpleNamespace(prefixes=None), cache_form=None)
        )
        impl.forward(None, query, None, None, None, step, torch.zeros(3, 4, 64))
    (sinks, cap), none = given
    assert none == (None, 0.0) and cap == 30.0
    assert sinks.dtype == torch.float32 and sinks.tolist() == [1.5, -2.0, 0.25, 0.0]
