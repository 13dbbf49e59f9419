"""A segment's problems, built when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.problem import Earlier, Problems, thin_positions
from kvsculpt_vllm.sculpt.queries import Asked, Turns, build_in_slices, held_out_of
from kvsculpt_vllm.sculpt.rotary import Rotary
from kvsculpt_vllm.sculpt.slices import Slices


@dataclass(frozen=True)
class SegmentSource:
    """What the problems of a segment are made of (`queries.build_in_slices` says what each of these means).

    In float32, with what is made of them, the problems of all layers take ten times the samples and more. So they are
    built for some layers at a time.
    """

    queries: Asked  # (L, P, heads, D)
    positions: Tensor  # (P,)
    recent: int
    keys: Tensor  # (L·H, n, D)
    values: Tensor  # (L·H, n, D)
    span: int
    sinks: int
    rotaries: Sequence[Rotary | None]  # L
    scale: float
    first: int = 0
    earlier: Earlier | None = None  # of all L·H problems
    sink_logits: Tensor | None = None  # (L, heads)
    soft_cap: float | None = None
    followed: bool = False
    turns: Turns = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.rotaries)

    @property
    def num_problems(self) -> int:
        """L·H: a problem is a KV head of a layer, layers outermost."""
        return len(self.keys)

    @property
    def heads(self) -> int:
        """H, the problems of a layer."""
        return self.num_problems // self.num_layers

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.keys.device

    @property
    def head_size(self) -> int:
        """D."""
        return self.keys.shape[2]

    def held_out(self, count: int) -> Tensor:
        """Say which of the query rows (Q,) bool are held out of a problem that is built with about `count` of each
        head's queries.
        """
        _, num_positions, heads, _ = self.queries.shape
        held_out = held_out_of(num_positions)
        held_out = torch.cat([held_out, held_out[-self.recent :]])
        return held_out[thin_positions(held_out, count)].repeat_interleave(heads // self.heads)

    @property
    def layer_bytes(self) -> int:
        """Bytes that the queries of one layer's problems take in float32."""
        _, num_positions, heads, head_size = self.queries.shape
        return (num_positions + self.recent) * heads * head_size * 4

    def of(self, numbers: Sequence[int], count: int | None = None) -> Slices[Problems]:
        """Build the problems of these `numbers`, with about `count` of each head's queries; None means all."""
        return build_in_slices(**vars(self), numbers=numbers, count=count)

    def problems_of(self, layers: range) -> range:
        """Say which of all problems those are."""
        return range(layers.start * self.heads, layers.stop * self.heads)
