"""What a fit is told of the softmax of a rank's attention layers."""

from types import SimpleNamespace

import pytest
import torch

from kvsculpt_vllm.engine.startup.refusals import UnsupportedFeature
from kvsculpt_vllm.engine.worker.attention_triton import SculptTritonImpl
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


@pytest.mark.parametrize("odd", [{"sinks": torch.zeros(4)}, {"logits_soft_cap": 30.0}], ids=["sinks", "soft cap"])
def test_attention_on_cuda_is_refused_what_its_kernel_does_not_know(odd):
    assert SculptTritonImpl(4, 64, 0.125).sinks is None
    with pytest.raises(UnsupportedFeature, match=r"learned attention sinks and soft caps on CUDA"):
        SculptTritonImpl(4, 64, 0.125, **odd)
