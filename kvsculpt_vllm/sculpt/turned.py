"""Another basis for a head's entries, in which few bits lose less. What attention answers is the same in it.

Eight bits are as precise for a large number as for a small one, relative to it. So what they lose of a logit ``q·k`` is
what they lose of its largest products, and in most models a few channels of the keys are far larger than the others.
Two things can be done about that, exactly, and without reading any text:

- The keys of a head may all be moved by one vector: every logit of a query then moves by the same number, and a softmax
  does not mind. Models whose key projection has a bias (Qwen2 and its kin) give all keys something in common, which is
  most of what they are in some heads (`centre`).
- Queries and keys may both be turned by an orthogonal matrix, and values, too, if the output is turned back. A Hadamard
  matrix spreads every channel over all of them (QuaRot, arXiv 2404.00456, section 4), so that none is much larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.rotary import Rotary


def hadamard(size: int) -> Tensor:
    """Build the orthogonal, symmetric matrix (D, D) of Sylvester's construction, float32: it is its own inverse.

    Where `size` is not a power of two, it turns neighbouring channels in blocks of the largest one that divides it.
    """
    block = size & -size
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / block**0.5] * (size // block))


def centre_of_first(keys: Tensor, rotary: Rotary | None) -> Tensor:
    """The same as `centre`, of `keys` (KV heads, D) that were turned at the first position, as a model gives them."""
    if rotary is None:
        return keys.float()
    positions = torch.arange(rotary.num_positions, device=rotary.cache.device)
    cos, sin = (each.mean(0, keepdim=True) for each in rotary.turn(torch.zeros_like(positions), positions))
    return rotary.turned(keys[None], (cos, sin))[0]


def centre(bias: Tensor, rotary: Rotary | None) -> Tensor:
    """Say what the keys of a layer have in common wherever they are: the mean (KV heads, D) of their projection's
    `bias` (KV heads, D) over all positions of the model, after their rotary embedding.

    Pairs of channels that turn fast have a mean of 0. None means keys that are not turned.
    """
    if rotary is None:
        return bias.float()
    # As linear in its cosines and sines as it is, the mean of what is turned is turned by their means.
    half = rotary.rotary_dim // 2
    cos, sin = rotary.cache.float().mean(0).split(half)
    return rotary.turned(bias[None], (cos[None, None], sin[None, None]))[0]
