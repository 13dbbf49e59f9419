"""What a cache of FP8 holds, and that a fit which knows of it loses less."""

import pytest
import torch

from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.methods import METHODS
from kvsculpt_vllm.evaluation.metrics import compare
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.sculpt.effort import EFFORTS

VOCABULARY, BLOCK, WINDOW, SINKS, LENGTH, FOLLOWING = 97, 16, 16, 4, 400, 32

pytestmark = pytest.mark.usefixtures("one_thread")


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


METHODS_IN_FP8 = ["sculpt_fp8", "sculpt_hadamard_fp8", "sculpt_rounded_fp8"]


@pytest.mark.parametrize("method", METHODS_IN_FP8)
def test_every_entry_is_what_fp8_can_mean_and_all_of_them_are_the_context_rounded(contexts, method):
    context, _ = contexts[0]
    few, every = context.compress(METHODS[method], "adaptive", [0.4, 1.0])
    end, exact = context.span_blocks * BLOCK, method != "sculpt_hadamard_fp8"  # a turn back rounds in float32
    for attempt in (few, every):
        cache, fitted = attempt.cache, attempt.fitted
        for part, form, recorded in (
            (cache.keys, fitted.forms[0], context.recording.keys),
            (cache.values, fitted.forms[1], context.recording.values),
        ):
            whole = form.rounded(recorded)
            for head, entries in enumerate(part):
                again = form.take(slice(head, head + 1)).rounded(entries[None])[0]
                torch.testing.assert_close(again, entries, rtol=0, atol=0 if exact else 1e-5)
                assert float(form.scales[head].log2()) == int(form.scales[head].log2())
                if attempt is every:
                    torch.testing.assert_close(entries[:end], whole[head, :end], rtol=0, atol=0 if exact else 1e-5)


def test_what_all_keys_share_is_not_rounded_and_a_loud_channel_is_spread(tiny_llama):
    plain = tiny_llama(2, 4, 2, VOCABULARY, 512)
    model = tiny_llama(2, 4, 2, VOCABULARY, 512, attention_bias=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    for layer in model.model.layers:
        for name, projection in layer.self_attn.named_children():
            projection.bias.data.zero_()
            if name == "k_proj":
                projection.bias.data[7] = 300.0  # of the slowest pair of the first head's channels
    evaluated = EvaluationModel(model)
    heads = evaluated.key_centres.view(2, 2, 16)
    assert (heads[:, 0, 7] > 250).all()
    assert (heads[:, 1] == 0).all() and (heads[:, 0].abs() > 1).sum() <= 2 * 2
    text = torch.randint(VOCABULARY, (LENGTH + FOLLOWING,), generator=torch.Generator().manual_seed(1)).tolist()
    pair = Context(evaluated, text[:LENGTH], FOLLOWING, EFFORTS["balanced"], BLOCK, WINDOW, SINKS), text[LENGTH:]
    assert kl([pair], "sculpt_hadamard_fp8", 1.0) < 0.1 * kl([pair], "sculpt_fp8", 1.0)


def test_a_fit_that_knows_of_fp8_loses_less_than_one_that_is_rounded_afterwards(contexts):
    alone, after, fitted, plain = (
        kl(contexts, "sculpt_rounded_fp8", 1.0),
        kl(contexts, "sculpt_rounded_fp8", 0.5),
        kl(contexts, "sculpt_fp8", 0.5),
        kl(contexts, "sculpt", 0.5),
    )
    assert alone > 0 and fitted < after and plain < fitted
