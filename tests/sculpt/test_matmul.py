"""Whatever library computes them, products stay float32's."""

import torch

from kvsculpt_vllm.sculpt import matmul
from kvsculpt_vllm.sculpt.matmul import fast_matmul


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
