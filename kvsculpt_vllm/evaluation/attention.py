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

from kvsculpt_vllm.evaluation.softmax import Softmax
from kvsculpt_vllm.evaluation.windows import Kept, Layers, attend_window, behind, kept
from kvsculpt_vllm.kernels.soft_cap import capped

NAME = "kvsculpt_evaluation"


class Cache(Protocol):
    """What stands in for the model's KV cache in one forward pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        """Attention output (heads, T, D) of new tokens: query (heads, T, D), key and value (KV heads, T, D)."""
        ...

    def attend_window(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, window: int
    ) -> Tensor:
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

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        """See `Cache`. There may be more keys and values than queries: the first ones are of tokens before these."""
        (heads, tail), new = key.shape[:2], query.shape[1]
        query = query.unflatten(0, (heads, -1)) * softmax.scale  # (H, G, T, D)
        # The engine stores new tokens' keys and values before anything reads them.
        key, value = key.to(self.storage).to(key.dtype), value.to(self.storage).to(value.dtype)
        hidden = torch.ones(new, tail, dtype=torch.bool, device=key.device).triu_(1 + tail - new)
        outputs = []
        for head in range(heads):
            kept_keys, kept_values = (held[layer * heads + head].to(key.dtype) for held in (self.keys, self.values))
            logits = query[head] @ torch.cat([kept_keys, key[head]]).T  # (G, T, entries + T)
            capped(logits, softmax.soft_cap)
            logits[..., len(kept_keys) :].masked_fill_(hidden, -torch.inf)
            if self.biases is not None:
                logits[..., : len(kept_keys)] += self.biases[layer * heads + head]
            outputs.append(softmax.shares(logits, head) @ torch.cat([kept_values, value[head]]))
        return torch.cat(outputs)

    def attend_window(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, window: int
    ) -> Tensor:
        """See `Cache`, and `attend` for more keys and values than queries."""
        return attend_window(query, *behind(self.windows[layer], key, value, self.storage), softmax, window)


class Continued:
    """A cache behind which tokens come in several passes, each of them computed once. The cache stays as it is."""

    def __init__(self, cache: RaggedCache) -> None:
        self._cache = cache
        self._tail: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}  # of each layer, and whether it has a window:
        # keys and values (KV heads, t, D)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        """See `Cache`."""
        return self._cache.attend(layer, query, *self._appended((layer, False), key, value), softmax)

    def attend_window(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, window: int
    ) -> Tensor:
        """See `Cache`."""
        return self._cache.attend_window(layer, query, *self._appended((layer, True), key, value), softmax, window)

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
        self._softmaxes: list[Softmax] = []  # per layer
        self._queries: list[Tensor] = []  # per layer (P, heads, D)
        self._keys: list[Tensor] = []  # per layer (KV heads, n, D)
        self._values: list[Tensor] = []
        self.windows: list[Kept] = []  # of each layer that sees a window: what it kept of the last tokens

    @property
    def scale(self) -> float:
        """The softmax scale of all layers."""
        return self._softmaxes[0].scale

    @property
    def soft_cap(self) -> float | None:
        """The soft cap on all layers' logits."""
        return self._softmaxes[0].soft_cap

    @property
    def sink_logits(self) -> Tensor | None:
        """Logits (L, heads) of learned sinks, -inf in a layer that has none; None if no layer has one."""
        sinks = [softmax.sink_logits for softmax in self._softmaxes]
        if all(of_layer is None for of_layer in sinks):
            return None
        none = torch.full(self._queries[0].shape[1:2], -torch.inf, device=self.positions.device)
        return torch.stack([none if of_layer is None else of_layer.detach().to(none) for of_layer in sinks])

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

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        """See `Cache`. Layers come in order."""
        self._softmaxes.append(softmax)
        same = len({(each.scale, each.soft_cap) for each in self._softmaxes}) == 1
        if layer != len(self._keys) or not same:
            raise NotImplementedError(
                f"layer {layer} does not fit: one full attention a layer, one scale and one soft cap are needed"
            )
        self._queries.append(query[:, self.positions - self._first].transpose(0, 1).to(self.storage))
        self._keys.append(key.to(self.storage))
        self._values.append(value.to(self.storage))
        if self._past is not None:
            return self._past.attend(layer, query, key, value, softmax)
        if softmax.soft_cap is not None or softmax.sink_logits is not None:
            nothing = [key[0, :0]] * (layer + 1) * len(key)
            return RaggedCache(nothing, nothing, self.storage).attend(layer, query, key, value, softmax)
        key, value = key.to(self.storage).to(key.dtype), value.to(self.storage).to(value.dtype)
        return nn.functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=softmax.scale, enable_gqa=True
        )[0]

    def attend_window(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, window: int
    ) -> Tensor:
        """See `Cache`. Layers come in order."""
        past = None if self._past is None else self._past.windows[layer]
        key, value = behind(past, key, value, self.storage)
        self.windows.append(kept(key, value, window, self.storage))
        return attend_window(query, key, value, softmax, window)


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if len(query) != 1 or attention_mask is not None:
        raise NotImplementedError("one sequence at a time, without an attention mask of its own")
    layer = module.layer_idx
    if evaluation_layers.have_window[layer] != (sliding_window is not None):
        raise NotImplementedError(f"layer {layer} sees another window ({sliding_window}) than the configuration says")
    new = evaluation_layers.numbers[layer], query[0], key[0], value[0], Softmax(scaling, softcap, s_aux)
    if sliding_window is None:
        out = evaluation_cache.attend(*new)
    else:
        out = evaluation_cache.attend_window(*new, sliding_window)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(NAME, _attention)
