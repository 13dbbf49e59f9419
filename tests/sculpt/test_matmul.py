"""Whatever library computes them, products stay float32's."""

import pytest
import torch

from kvsculpt_vllm.sculpt import matmul
from kvsculpt_vllm.sculpt.matmul import fast_matmul, rounded_products, solved_by


def test_products_are_as_exact_as_float32_and_the_setting_is_put_back():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    a, b = torch.randn(2, 700, 66), torch.randn(2, 66, 500)
    try:
        with fast_matmul():
            product = torch.bmm(a, b)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert settings.fp32_precision == before
    wanted = torch.bmm(a.double(), b.double())
    assert (product - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_processor_that_would_compute_in_bfloat16_is_left_alone(monkeypatch):
    stock = torch.bmm

    def rounding(a, b):
        if torch.backends.mkldnn.matmul.fp32_precision == "bf16" and a.dtype == torch.float32:
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return stock(a, b)

    monkeypatch.setattr(torch, "bmm", rounding)
    matmul._exact.cache_clear()
    try:
        with fast_matmul():
            assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
    finally:
        matmul._exact.cache_clear()


@pytest.mark.parametrize(("device", "inside"), [("cuda", "tf32"), ("cpu", None)])
def test_only_a_gpu_rounds_products_and_only_there(device, inside):
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    with pytest.raises(KeyboardInterrupt), rounded_products(torch.device(device)):
        assert settings.fp32_precision == (inside or before)
        raise KeyboardInterrupt
    assert settings.fp32_precision == before


def test_a_few_systems_are_solved_by_their_factors():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, 50, 80, generator=generator, dtype=torch.float64)
    systems, right = rows @ rows.mT / 80, torch.randn(3, 50, 7, generator=generator, dtype=torch.float64)
    factors = torch.linalg.cholesky(systems.float())
    found = solved_by(factors, right.float().expand(2, -1, -1, -1))
    torch.testing.assert_close(
        found.double(), torch.linalg.solve(systems, right.expand(2, -1, -1, -1)), rtol=1e-3, atol=1e-4
    )
