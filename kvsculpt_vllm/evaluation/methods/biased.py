"""Entries that carry a number to add to their logit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvsculpt_vllm.sculpt.compress import Compressed


@dataclass
class BiasedCompressed(Compressed):
    """`biases[b]` (entries of problem b,): what a key's logit is raised by.

    The numbers are not counted in the kept fraction: one more for every 2D that an entry has.
    """

    biases: list[Tensor]
