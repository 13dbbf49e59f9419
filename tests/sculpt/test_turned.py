"""A basis for few bits: orthogonal, and centred where keys have something in common."""

import pytest
import torch
from scipy.linalg import hadamard as of_scipy

from kvsculpt_vllm.sculpt.rotary import Rotary
from kvsculpt_vllm.sculpt.turned import centre, centre_of_first, hadamard


@pytest.mark.parametrize("size", [1, 2, 64, 256])
def test_it_is_scipys_matrix_made_orthogonal(size):
    expected = torch.from_numpy(of_scipy(size)).double() / size**0.5
    torch.testing.assert_close(hadamard(size).double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [3, 48, 80, 192])
def test_of_other_sizes_it_is_its_own_inverse_and_spreads_a_channel_over_a_block(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size))
    assert torch.equal(matrix, matrix.T)
    block = {3: 1, 48: 16, 80: 16, 192: 64}[size]
    assert torch.equal((matrix != 0).sum(0), torch.full((size,), block))


@pytest.mark.parametrize(("neox", "rotary_dim"), [(True, 8), (False, 8), (True, 4)])
def test_a_centre_is_the_mean_of_the_bias_at_every_position(neox, rotary_dim):
    positions = torch.arange(50.0)[:, None]
    angles = positions / 100 ** (torch.arange(rotary_dim // 2) / (rotary_dim // 2))
    scaled = 1.3  # as YaRN's cosines and sines are
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], 1) * scaled, rotary_dim, neox)
    bias = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(3, 8, dtype=torch.double)
    for angle in angles.double():
        turned = bias.double().clone()
        for pair, (cos, sin) in enumerate(zip(angle.cos(), angle.sin(), strict=True)):
            a, b = (pair, pair + rotary_dim // 2) if neox else (2 * pair, 2 * pair + 1)
            x, y = bias[:, a].double(), bias[:, b].double()
            turned[:, a], turned[:, b] = scaled * (x * cos - y * sin), scaled * (y * cos + x * sin)
        expected += turned / 50
    torch.testing.assert_close(centre(bias, rotary).double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(centre(bias, None), bias)
    at_first = rotary.turned(bias[None], tuple(each[None, None] for each in rotary.cache[0].split(rotary_dim // 2)))[0]
    torch.testing.assert_close(centre_of_first(at_first, rotary).double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(centre_of_first(bias, None), bias)
