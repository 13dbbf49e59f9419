"""What turns a layer's products of queries and keys into weights: its scale, its soft cap, its learned sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """What a layer's attention does with the products of queries and keys."""

    scale: float
    soft_cap: float | None = None
    sink_logits: Tensor | None = None  # (heads,) of learned sinks

    def shares(self, logits: Tensor, head: int) -> Tensor:
        """The softmax weights of entries with `logits` (G, T, n), which are under the cap, for the queries of the group
        of the KV head `head`.
        """
        if self.sink_logits is None:
            return logits.softmax(-1)
        sinks = self.sink_logits.unflatten(0, (-1, len(logits)))[head].to(logits.dtype)
        return torch.cat([logits, sinks[:, None, None].expand(*logits.shape[:2], 1)], dim=-1).softmax(-1)[..., :-1]

    @property
    def is_plain(self) -> bool:
        """Whether it has neither a cap nor sinks."""
        return self.soft_cap is None and self.sink_logits is None
