"""Rotary embeddings once more, by another formula than the package's."""

import torch


def frequencies(head_size):
    """Radians a position, in float64."""
    return 10000.0 ** (-torch.arange(head_size // 2, dtype=torch.float64) / (head_size // 2))


def rotate(x, positions):
    """RoPE by complex numbers: x (..., P, D), halves paired."""
    angles = positions.double()[:, None] * frequencies(x.shape[-1])
    turns = torch.polar(torch.ones_like(angles), angles)
    turned = torch.complex(*x.double().chunk(2, dim=-1)) * turns
    return torch.cat([turned.real, turned.imag], dim=-1)
