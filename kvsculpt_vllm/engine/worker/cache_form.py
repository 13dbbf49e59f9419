"""The form in which a cache of FP8 holds entries: what goes into it, and what is asked and answered there.

Keys are moved by what all of them have in common, and keys and values are turned by a Hadamard matrix (`sculpt.turned`
says why). Attention on them is the same: a query is turned, too, and its answer is turned back. There are no scales: a
number in the cache is an element, as with vLLM's own scale of 1. FP8 reaches from 0.016 to 448 with all its bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvsculpt_vllm.engine.startup.refusals.layers import unseen_queries
from kvsculpt_vllm.engine.worker.model_rotary import seen_at
from kvsculpt_vllm.sculpt.rotary import Rotary
from kvsculpt_vllm.sculpt.storage import Form
from kvsculpt_vllm.sculpt.turned import centre_of_first, hadamard


class CacheForm:
    """What one rank's layers do to keys, values, queries and answers."""

    def __init__(self, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` is that of queries and answers."""
        turn = hadamard(head_size).to(device)
        self._of_queries = turn.to(dtype)
        self._form = Form(torch.ones(1, device=device), turn)
        self._centres: Tensor | None = None

    def set_centres(self, centres: Tensor) -> None:
        """Say what the keys (L, KV heads, D) of each head have in common, before any is stored."""
        self._centres = centres

    def of(self, count: int) -> Form:
        """The form of so many heads' entries; keys are those of `key_numbers`, without what they have in common."""
        return Form(self._form.scales.expand(count), self._form.turn)

    def key_numbers(self, layer: int, key: Tensor) -> Tensor:
        """What the cache holds of new keys (T, KV heads, D) of a layer."""
        return self._form.numbers(key if self._centres is None else key.float() - self._centres[layer])

    def value_numbers(self, value: Tensor) -> Tensor:
        """What the cache holds of new values (T, KV heads, D)."""
        return self._form.numbers(value)

    def turned(self, heads: Tensor) -> Tensor:
        """Queries (T, heads, D) as they are to be asked, and answers as the model is to have them."""
        return heads @ self._of_queries


def key_centres(runner: Any, layers: Mapping[str, Any], rotaries: list[Rotary | None]) -> Tensor:
    """What all keys of a head have in common wherever they are (L, KV heads, D): the keys of a content that is nothing
    to any projection, which are those of the biases, averaged over all positions. It is 0 where a random content's key
    is not smaller without it: of a norm behind the projection, say.

    Raises:
        UnsupportedFeature: the model fails when it is run to see its keys.
    """
    first = torch.zeros(1, dtype=torch.long, device=runner.device)
    try:
        common, drawn = seen_at(runner, layers, first, content=0.0), seen_at(runner, layers, first)
    except Exception as error:  # whatever a model or a layer raises
        raise unseen_queries(next(iter(layers)), error) from error
    centres = []
    for name, rotary in zip(layers, rotaries, strict=True):
        own, other = common[name][1][0].float(), drawn[name][1][0].float()  # (KV heads, D)
        is_there = (other - own).square().sum(1, keepdim=True) < other.square().sum(1, keepdim=True)
        centres.append(torch.where(is_there, centre_of_first(own, rotary), 0.0))
    return torch.stack(centres)
