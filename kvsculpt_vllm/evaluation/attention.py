"""Attention for transformers models in which every (layer, KV head) may have a cache of its own length.

Transformers calls the function registered here with whatever keyword `forward` of the model was given, so the cache
travels as an argument: nothing of the model is replaced, and there is no state between two calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvsculpt_vllm.evaluation.windows import Kept, Layers, attend_window, behind, kept

NAME = "kvsculpt_evaluation"

UNSUPPORTED = ("softcap", "s_aux")
"""What other architectures hand to their attention and we would have to honour."""


class Cache(Protocol):
    """What stands in for the model's KV cache in one forward pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention output (heads, T, D) of new tokens: query (heads, T, D), key and value (KV heads, T, D)."""
        ...

    def attend_window(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
        """The same of a layer that sees the last `window` tokens; such layers have numbers of their own."""
        ...


class AttentionModule(Protocol):
    """An attention layer of a transformers model."""

    layer_idx: int  # among the model's layers


@dataclass(frozen=True)
class RaggedCache:
    """What every head kept of a context; new tokens see all of it, and of themselves what causality allows."""

    keys: list[Tensor]  # per problem (layer · KV heads + KV head): (entries, D)
    values: list[Tensor]
    storage: torch.dtype
    biases: list[Tensor] | None = None  # (entries,), added to the logits
    windows: Sequence[Kept] = ()  # of each layer that sees a window: what it kept of the context's end

    @property
    def num_entries(self) -> int:
        """Entries of all heads together."""
        return sum(len(keys) for keys in self.keys)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Cache`. There may be more keys and values than queries: the first ones are of tokens before these."""
        (heads, tail), new = key.shape[:2], query.shape[1]
        query = query.unflatten(0, (heads, -1)) * scale  # (H, G, T, D)
        # The engine stores new tokens' keys and values before anything reads them.
        key, value = key.to(self.storage).to(key.dtype), value.to(self.storage).to(value.dtype)
        hidden = torch.ones(new, tail, dtype=torch.bool, device=key.device).triu_(1 + tail - new)
        outputs = []
        for head in range(heads):
            kept_keys, kept_values = (held[layer * heads + head].to(key.dtype) for held in (self.keys, self.values))
            logits = query[head] @ torch.cat([kept_keys, key[head]]).T  # (G, T, entries + T)
            logits[..., len(kept_keys) :].masked_fill_(hidden, -torch.inf)
            if self.biases is not None:
                logits[..., : len(kept_keys)] += self.biases[layer * heads + head]
            outputs.append(logits.softmax(-1) @ torch.cat([kept_values, value[head]]))
        return torch.cat(outputs)

    def attend_window(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
        """See `Cache`, and `attend` for more keys and values than queries."""
        return attend_window(query, *behind(self.windows[layer], key, value, self.storage), scale, window)


class Continued:
    """A cache behind which tokens come in several passes, each of them computed once. The cache stays as it is."""

    def __init__(self, cache: RaggedCache) -> None:
        self._cache = cache
        self._tail: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}  # of each layer, and whether it has a window:
        # keys and values (KV heads, t, D)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Cache`."""
        return self._cache.attend(layer, query, *self._appended((layer, False), key, value), scale)

    def attend_window(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
        """See `Cache`."""
        return self._cache.attend_window(layer, query, *self._appended((layer, True), key, value), scale, window)

    def _appended(self, layer: tuple[int, bool], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self._tail:
            key, value = (torch.cat(pair, 1) for pair in zip(self._tail[layer], (key, value), strict=True))
        self._tail[layer] = key, value
        return key, value

    def cut(self, count: int) -> None:
        """Forget all tokens behind the first `count`."""
        self._tail = {layer: (key[:, :count], value[:, :count]) for layer, (key, value) in self._tail.items()}


class Recorder:
    """Plain causal attention that keeps what the engine would: all keys and values, and sampled queries.

    Everything is rounded to `storage`, the cache's dtype; attention sees keys and values rounded, as in the engine. The
    first token recorded has position `first`; what `past` holds of those before it is seen, and not recorded.
    """

    def __init__(
        self, positions: Tensor, storage: torch.dtype, first: int = 0, past: RaggedCache | None = None
    ) -> None:
        self.positions, self.storage = positions, storage
        self._first, self._past = first, past
        self.scale = 0.0
        self._queries: list[Tensor] = []  # per layer (P, heads, D)
        self._keys: list[Tensor] = []  # per layer (KV heads, n, D)
        self._values: list[Tensor] = []
        self.windows: list[Kept] = []  # of each layer that sees a window: what it kept of the last tokens

    @property
    def queries(self) -> Tensor:
        """Sampled queries (L, P, heads, D), after their rotary embedding."""
        return torch.stack(self._queries)

    @property
    def keys(self) -> Tensor:
        """All keys (L·H, n, D), layers outermost."""
        return torch.cat(self._keys)

    @property
    def values(self) -> Tensor:
        """All values (L·H, n, D)."""
        return torch.cat(self._values)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Cache`. Layers come in order."""
        if layer != len(self._keys) or (self.scale and scale != self.scale):
            raise NotImplementedError(
                f"layer {layer} does not fit: one full attention a layer and one scale are needed"
            )
        self.scale = scale
        self._queries.append(query[:, self.positions - self._first].transpose(0, 1).to(self.storage))
        self._keys.append(key.to(self.storage))
        self._values.append(value.to(self.storage))
        if self._past is not None:
            return self._past.attend(layer, query, key, value, scale)
        key, value = key.to(self.storage).to(key.dtype), value.to(self.storage).to(value.dtype)
        return nn.functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
        )[0]

    def attend_window(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
        """See `Cache`. Layers come in order."""
        past = None if self._past is None else self._past.windows[layer]
        key, value = behind(past, key, value, self.storage)
        self.windows.append(kept(key, value, window, self.storage))
        return attend_window(query, key, value, scale, window)


def _attention(
    module: AttentionModule,
    query: Tensor,  # (1, heads, T, D)
    key: Tensor,  # (1, KV heads, T, D), of the new tokens only
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    evaluation_cache: Cache,
    evaluation_layers: Layers,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} attends with {name}, which cannot be evaluated")
    if len(query) != 1 or attention_mask is not None:
        raise NotImplementedError("one sequence at a time, without an attention mask of its own")
    layer = module.layer_idx
    if evaluation_layers.have_window[layer] != (sliding_window is not None):
        raise NotImplementedError(f"layer {layer} sees another window ({sliding_window}) than the configuration says")
    new = evaluation_layers.numbers[layer], query[0], key[0], value[0], scaling
    if sliding_window is None:
        out = evaluation_cache.attend(*new)
    else:
        out = evaluation_cache.attend_window(*new, sliding_window)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(NAME, _attention)
