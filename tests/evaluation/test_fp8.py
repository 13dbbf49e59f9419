"""What a cache of FP8 holds, and that a fit which knows of it loses less."""

import pytest
import torch

from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.methods import METHODS
from kvsculpt_vllm.evaluation.methods.fp8 import rounded
from kvsculpt_vllm.evaluation.metrics import compare
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.sculpt.effort import EFFORTS

VOCABULARY, BLOCK, WINDOW, SINKS, LENGTH, FOLLOWING = 97, 16, 16, 4, 400, 32

pytestmark = pytest.mark.usefixtures("one_thread")


def in_fp8(number, scale):
    """The nearest number of three bits of mantissa, bit by bit; subnormal below 2^-6, at most 448."""
    if number == 0:
        return 0.0
    sign, size = (-1 if number < 0 else 1), abs(number) / scale
    step = 2.0 ** max(torch.tensor(size).log2().floor().item(), -6) / 8
    return sign * min(round(size / step) * step, 448.0) * scale


@pytest.mark.parametrize("scale", [0.25, 1.0, 16.0])
def test_rounding_is_to_the_nearest_number_of_e4m3(scale):
    entries = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) * 100
    entries[0, :4] = torch.tensor([0.0, 1e4 * scale, 0.003 * scale, -448.0 * scale])
    expected = [[in_fp8(float(element), scale) for element in row] for row in entries]
    torch.testing.assert_close(rounded(entries, torch.tensor(scale)), torch.tensor(expected), rtol=0, atol=0)


@pytest.fixture(scope="module")
def contexts(tiny_llama):
    model = EvaluationModel(tiny_llama(2, 4, 2, VOCABULARY, 512))
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(VOCABULARY, (LENGTH + FOLLOWING,), generator=generator).tolist() for _ in range(3)]
    return [
        (Context(model, text[:LENGTH], FOLLOWING, EFFORTS["balanced"], BLOCK, WINDOW, SINKS), text[LENGTH:])
        for text in texts
    ]


def kl(contexts, method, keep_ratio):
    lost = 0.0
    for context, continuation in contexts:
        (attempt,) = context.compress(METHODS[method], "adaptive", [keep_ratio])
        logits, exact = (
            context.model.continue_from(cache, continuation, LENGTH) for cache in (attempt.cache, context.full_cache)
        )
        lost += float(compare(exact, logits, continuation).kl.mean())
    return lost


@pytest.mark.parametrize("method", ["sculpt_fp8", "sculpt_rounded_fp8"])
def test_every_entry_is_what_fp8_can_mean_and_all_of_them_are_the_context_rounded(contexts, method):
    context, _ = contexts[0]
    few, every = context.compress(METHODS[method], "adaptive", [0.4, 1.0])
    for attempt in (few, every):
        fitted = attempt.fitted
        for part, scales in ((attempt.cache.keys, fitted.key_scales), (attempt.cache.values, fitted.value_scales)):
            for entries, scale in zip(part, scales, strict=True):
                assert torch.equal(rounded(entries, scale), entries)
                assert float(scale.log2()) == int(scale.log2())
    for held, whole, scale in zip(every.cache.keys, context.recording.keys, every.fitted.key_scales, strict=True):
        end = context.span_blocks * BLOCK
        assert torch.equal(held[:end], rounded(whole[:end], scale))


def test_a_fit_that_knows_of_fp8_loses_less_than_one_that_is_rounded_afterwards(contexts):
    alone, after, fitted, plain = (
        kl(contexts, "sculpt_rounded_fp8", 1.0),
        kl(contexts, "sculpt_rounded_fp8", 0.5),
        kl(contexts, "sculpt_fp8", 0.5),
        kl(contexts, "sculpt", 0.5),
    )
    assert alone > 0 and fitted < after and plain < fitted
