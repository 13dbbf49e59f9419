"""Streamed attention and streamed scores against their twins in float64."""

import math

import pytest
import torch

from kvsculpt_vllm.kernels.attention_scores import attention_with_lse, attention_with_lse_twin, received, received_twin
from kvsculpt_vllm.sculpt.foretold import SHARPLY

POWERS = [1, 2, SHARPLY]
CAPS = [None, 4.0]  # the largest logits are twice that and more
CASES = [(2, 63, 111, 64), (1, 1, 1, 128), (1, 70, 130, 96), (1, 33, 40, 256)]


def tensors(batch, num_queries, n, head_size, device):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, num_queries, head_size), (batch, n, head_size), (batch, n, head_size)
    # Sharp attention: the largest logits are far from the mean.
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device) * (0.5 if i == 0 else 1.0)
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("soft_cap", CAPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_that_of_a_softmax(case, soft_cap, device):
    queries, keys, values = tensors(*case, device)
    wanted = attention_with_lse_twin(queries, keys, values, soft_cap)
    found = attention_with_lse(queries.float(), keys.float(), values.float(), soft_cap)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=0, atol=3e-3)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("soft_cap", CAPS)
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_sum_the_attention_over_the_queries(case, power, soft_cap, device):
    queries, keys, values = tensors(*case, device)
    lse = attention_with_lse_twin(queries, keys, values, soft_cap)[1] + 0.3  # something else is seen, too
    found = received(queries.float(), lse.float(), keys.float(), power, soft_cap)
    wanted = received_twin(queries, lse, keys, power, soft_cap)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("soft_cap", CAPS)
def test_the_twins_are_a_softmax_over_what_the_cap_makes_of_every_logit(soft_cap, power):
    queries, keys, values = tensors(1, 7, 5, 16, "cpu")
    for i, query in enumerate(queries[0].tolist()):
        logits = [sum(x * y for x, y in zip(query, key, strict=True)) for key in keys[0].tolist()]
        if soft_cap is not None:
            logits = [soft_cap * math.tanh(logit / soft_cap) for logit in logits]
        mass = sum(map(math.exp, logits))
        wanted = sum(math.exp(logit) / mass * value for logit, value in zip(logits, values[0], strict=True))
        out, lse = attention_with_lse_twin(queries[:, i : i + 1], keys, values, soft_cap)
        torch.testing.assert_close(out[0, 0], wanted)
        assert float(lse) == pytest.approx(math.log(mass))
        shares = torch.tensor([(math.exp(logit) / mass) ** power for logit in logits], dtype=torch.float64)
        torch.testing.assert_close(received_twin(queries[:, i : i + 1], lse, keys, power, soft_cap)[0], shares)


def test_huge_logits_stay_finite(device):
    queries, keys, values = (x.float() for x in tensors(1, 20, 70, 64, device))
    out, lse = attention_with_lse(queries * 200, keys, values)
    best = (queries @ keys.transpose(1, 2)).argmax(-1)
    assert out.isfinite().all() and lse.isfinite().all()
    torch.testing.assert_close(out[0], values[0, best[0]], rtol=0, atol=2e-2)


def test_what_does_not_fit_is_named(device):
    queries, keys, values = (x.float() for x in tensors(1, 20, 70, 64, device))
    with pytest.raises(ValueError, match="keys: none given"):
        attention_with_lse(queries, keys[:, :0], values[:, :0])
    with pytest.raises(ValueError, match="power: 0 given"):
        received(queries, queries[..., 0], keys, 0)
    wide = queries.new_zeros(1, 2, 264)
    with pytest.raises(ValueError, match="head size: 264 given, allowed: 1 to 256"):
        attention_with_lse(wide, wide, wide)
