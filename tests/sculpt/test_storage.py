"""What a cache of FP8 makes of entries: bit by bit, and in a basis in which attention is the same."""

import pytest
import torch

from kvsculpt_vllm.kernels.pages import FP8
from kvsculpt_vllm.sculpt.storage import Form, Storage
from kvsculpt_vllm.sculpt.turned import hadamard


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
    form = Form(torch.tensor([scale]))
    torch.testing.assert_close(form.rounded(entries[None])[0], torch.tensor(expected), rtol=0, atol=0)


@pytest.fixture
def drawn():
    """Entries (2, 50, 16) with a loud channel and much in common, and a form for them."""
    generator = torch.Generator().manual_seed(0)
    entries, centres = torch.randn(2, 50, 16, generator=generator), 40 * torch.randn(2, 16, generator=generator)
    entries[:, :, 3] *= 30
    entries += centres[:, None]
    return entries, Form.of(entries, hadamard(16), centres)


def test_what_is_stored_is_stored_again_as_it_is_and_heads_are_their_own(drawn):
    entries, form = drawn
    stored = form.numbers(entries)
    assert stored.dtype == FP8
    assert torch.equal(form.numbers(form.meant(stored)).float(), stored.float())
    second = form.take(torch.tensor([1]))
    assert torch.equal(second.rounded(entries[1:]), form.rounded(entries)[1:])
    candidates = torch.stack([entries, 2 * entries, entries])  # (R, B, m, D)
    assert torch.equal(form.rounded(candidates)[2], form.rounded(entries))


def test_a_centre_and_a_turn_lose_less_and_attention_is_as_it_was(drawn):
    entries, form = drawn
    assert (form.rounded(entries) - entries).square().sum() < 0.1 * (
        Form.of(entries).rounded(entries) - entries
    ).square().sum()
    queries = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1)).double()
    numbers = form.numbers(entries).double() * form.scales[:, None, None]
    turned = (queries @ form.turn.double()) @ numbers.transpose(1, 2)
    plain = queries @ form.rounded(entries).double().transpose(1, 2)
    torch.testing.assert_close(turned.softmax(-1), plain.softmax(-1), rtol=1e-4, atol=1e-6)


def test_a_cache_rounds_to_its_dtype_or_to_its_forms(drawn):
    entries, form = drawn
    plain, few = Storage(torch.bfloat16), Storage(torch.bfloat16, (form, form))
    assert torch.equal(plain.keys(entries), entries.bfloat16().float()) and plain.coarse_keys(entries) is entries
    assert plain.take([1]) is plain and plain.result_dtype == torch.bfloat16
    assert torch.equal(few.values(entries), form.rounded(entries)) and few.result_dtype == torch.float32
    assert torch.equal(few.take([1]).coarse_keys(entries[1:]), form.rounded(entries)[1:])
