"""Entries that carry a number to add to their logit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvsculpt_vllm.sculpt.compress import Compressed


@dataclass
class BiasedCompressed(Compressed):
    """Compressed entries that carry a bias each: `biases[b]` (entries of problem b,) is added to the logit of each key.

    The kept fraction does not count the biases: they are one more number for every 2D that an entry has.
    """

    biases: list[Tensor]
