"""Layers that see a window of the last tokens: nothing of theirs is compressed, and they keep no more than a window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvsculpt_vllm.evaluation.softmax import Softmax
from kvsculpt_vllm.kernels.soft_cap import capped
from kvsculpt_vllm.layer_kinds import FULL, WINDOW, kinds_of

ROWS = 512
"""Queries that attend at once: the logits of a whole context would take gigabytes."""

Kept = tuple[Tensor, Tensor]
"""Keys and values (KV heads, at most window - 1, D) of the last tokens that a layer has seen, in the cache's dtype."""


class Layers:
    """Which layers of a model see everything, and which a window; each kind has numbers of its own, from 0 on."""

    def __init__(self, config: Any) -> None:
        """Read a transformers text configuration.

        Raises:
            NotImplementedError: there is a layer of another kind, or none that sees everything.
        """
        kinds = kinds_of(config)
        if other := set(kinds) - {FULL, WINDOW}:
            raise NotImplementedError(f"layers of the kind {', '.join(sorted(other))} cannot be evaluated")
        if FULL not in kinds:
            raise NotImplementedError("every layer sees a window only, so there is nothing to compress")
        self.have_window = [kind == WINDOW for kind in kinds]
        self.numbers = [kinds[:layer].count(kind) for layer, kind in enumerate(kinds)]

    @property
    def num_full(self) -> int:
        """How many see everything: those that are compressed."""
        return self.have_window.count(False)


def attend_window(
    query: Tensor,  # (heads, T, D) of the last T tokens
    key: Tensor,  # (KV heads, n, D) of these and of tokens before them, n ≥ T
    value: Tensor,
    softmax: Softmax,
    window: int,
) -> Tensor:
    """Attend (heads, T, D) causally to the last `window` tokens, a query's own among them."""
    count, before = query.shape[1], key.shape[1] - query.shape[1]
    outputs = []
    for begin in range(0, count, ROWS):
        end = min(begin + ROWS, count)
        first, last = max(0, before + begin - window + 1), before + end
        at = torch.arange(before + begin, last, device=query.device)[:, None]
        seen = torch.arange(first, last, device=query.device)
        part = query[:, begin:end], key[:, first:last], value[:, first:last], (seen <= at) & (seen > at - window)
        outputs.append(_attend(*part, softmax))
    return torch.cat(outputs, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, softmax: Softmax) -> Tensor:
    """Attend (heads, T, D) to the keys that `visible` (T, n) shows."""
    if softmax.is_plain:
        return nn.functional.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=visible, scale=softmax.scale, enable_gqa=True
        )[0]
    outputs = []
    for head, grouped in enumerate(query.unflatten(0, (len(key), -1)) * softmax.scale):
        logits = capped(grouped @ key[head].T, softmax.soft_cap).masked_fill_(~visible, -torch.inf)
        outputs.append(softmax.shares(logits, head) @ value[head])
    return torch.cat(outputs)


def behind(past: Kept | None, key: Tensor, value: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Append new keys and values, rounded to the cache's dtype, to what a layer has kept."""
    new = key.to(storage).to(key.dtype), value.to(storage).to(value.dtype)
    if past is None:
        return new
    return torch.cat([past[0].to(key.dtype), new[0]], 1), torch.cat([past[1].to(value.dtype), new[1]], 1)


def kept(key: Tensor, value: Tensor, window: int, storage: torch.dtype) -> Kept:
    """Take what the tokens to come will see of these keys and values (KV heads, n, D)."""
    first = max(0, key.shape[1] - window + 1)
    return key[:, first:].to(storage), value[:, first:].to(storage)
