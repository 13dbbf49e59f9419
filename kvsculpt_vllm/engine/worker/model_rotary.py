"""The rotary embedding of each attention layer: found among the model's modules, chosen by the model's queries.

Where an embedding lies and what it means differ by architecture and by implementation (vLLM's own, transformers'),
and some layers have none by design. So the model is run on one content at several positions, and what its attention
layers are asked decides: queries that are the same everywhere have none, the others have the one that turns the
first of them into the rest. What no embedding explains is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention

from kvsculpt_vllm.engine.compat.worker import run_model
from kvsculpt_vllm.engine.startup.refusals.layers import check_positions, unseen_queries
from kvsculpt_vllm.sculpt.queries import FUTURE_TOKENS
from kvsculpt_vllm.sculpt.rotary import Rotary, rotaries_of, same_queries


def rotary_of_layers(runner: Any, layers: Mapping[str, nn.Module]) -> list[Rotary | None]:
    """The rotary embedding of each attention layer, None for those whose queries do not depend on the position.

    Args:
        runner: a model runner with its model loaded.
        layers: the model's attention layers by name.

    Raises:
        UnsupportedFeature: naming a layer with another dependence on the position.
    """
    candidates = Candidates(runner, layers)
    near, far = probed_positions(candidates.context, runner.device)
    try:
        alone, asked = (asked_at(runner, layers, positions) for positions in (near, far))
    except Exception as error:  # whatever a model or a layer raises
        raise unseen_queries(next(iter(layers)), error) from error
    early = near == far
    restless = [name for name in asked if not same_queries(alone[name][early], asked[name][early])]
    rotaries, unexplained = [], []
    for name, layer in layers.items():
        queries = asked.get(name)
        found = None if queries is None else candidates.find(layer, queries, far)
        if found is None and (queries is None or not same_queries(queries[:1], queries)):
            unexplained.append(name)
        rotaries.append(found)
    check_positions(restless, unexplained)
    return rotaries


def probed_positions(context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where to look at a model's queries: small positions, and the same with large ones among them."""
    last = context - 1
    chosen = [0, 1, 2, 5, 17, 61, FUTURE_TOKENS + 1, last // 3, last * 2 // 3, last]
    far = torch.tensor(sorted({min(position, last) for position in chosen}), device=device)
    return torch.where(far < 64, far, 0), far


def asked_at(runner: Any, layers: Mapping[str, nn.Module], positions: Tensor) -> dict[str, Tensor]:
    """What each of these attention layers is asked (N, heads, D) at `positions` (N,), all of one content."""
    return {name: query for name, (query, _) in seen_at(runner, layers, positions).items()}


@torch.inference_mode()
def seen_at(
    runner: Any, layers: Mapping[str, nn.Module], positions: Tensor, content: float | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Queries (N, heads, D) and keys (N, KV heads, D) that each of these attention layers is given at `positions` (N,),
    all of one content: random, or in every element the number `content`.
    """
    hidden_size = runner.vllm_config.model_config.get_hidden_size()
    drawn = torch.randn(hidden_size, generator=torch.Generator().manual_seed(0)).to(positions.device)
    given = drawn if content is None else torch.full_like(drawn, content)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def same_content(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Else learned position embeddings would look like a rotation that is not understood."""

        def replaced(value: Any) -> Any:
            hidden = isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1] == hidden_size
            return given.to(value.dtype).expand_as(value).contiguous() if hidden else value

        return tuple(map(replaced, args)), {name: replaced(value) for name, value in kwargs.items()}

    def keep(name: str, layer: Any) -> Callable[..., Tensor]:
        def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nothing = torch.zeros_like(query)
            query, key = (each.reshape(len(positions), -1, layer.head_size).clone() for each in (query, key))
            seen[name] = query, key
            return nothing

        return forward

    def attend_to_nothing(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(query)

    parents = parents_of(runner.get_model())
    owners = {parents[layer] for layer in layers.values()}
    others = {module for module in runner.get_model().modules() if isinstance(module, Attention)} - {*layers.values()}
    forwards = dict.fromkeys(others, attend_to_nothing) | {layer: keep(name, layer) for name, layer in layers.items()}
    hooks = [owner.register_forward_pre_hook(same_content, with_kwargs=True) for owner in owners]
    try:
        with replaced_forwards(forwards):
            run_model(runner, positions)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Let these functions stand in for the modules' forward passes."""
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def parents_of(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The module that each of the model's modules is part of."""
    return {child: module for module in model.modules() for child in module.children()}


class Candidates:
    """The rotary embeddings that attention layers may have, each a way to read one of the model's modules.

    A layer's are near it: beside it, or beside something that it is part of. So those of a vision tower are none.
    """

    def __init__(self, runner: Any, layers: Mapping[str, nn.Module]) -> None:
        self._config, self._device = runner.vllm_config.model_config, runner.device
        self._parents = parents_of(runner.get_model())
        self._known: dict[nn.Module, Rotary] = {}  # how a module was read for another layer
        tables = [
            max(map(len, found))
            for layer in layers.values()
            for module in self._modules(layer)
            if (found := _tables(module))
        ]
        # A table that ends before the model's context, which vLLM allows, is not to be read beyond its end.
        self.context: int = min([self._config.max_model_len, *tables])

    def find(self, layer: nn.Module, queries: Tensor, positions: Tensor) -> Rotary | None:
        """The one that explains the layer's queries (N, heads, D), the nearest first."""
        for module in self._modules(layer):
            for rotary in self._readings(module):
                if rotary.explains(queries, positions):
                    self._known[module] = rotary
                    return rotary
        return None

    def _modules(self, layer: nn.Module) -> Iterator[nn.Module]:
        around = self._parents.get(layer)
        while around is not None:
            yield from (child for child in around.children() if _tables(child) or _takes_positions(child))
            around = self._parents.get(around)

    def _readings(self, module: nn.Module) -> Iterator[Rotary]:
        if module in self._known:
            yield self._known[module]
        for table in _tables(module):
            yield Rotary(table, table.shape[1], getattr(module, "is_neox_style", True))
        if _takes_positions(module):
            for cos, sin in self._angles(module):
                yield from rotaries_of(cos, sin)

    @torch.no_grad()
    def _angles(self, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Cosines and sines (positions, n) of a module of transformers' kind, as far as any query will ask from.

        First for all positions that the model has; then for those of requests alone, since a module may turn by other
        angles once it sees a position beyond the model's original context.
        """
        length, text = self._config.max_model_len, self._config.hf_text_config
        there = max(length, getattr(text, "max_position_embeddings", None) or 0)
        like = torch.zeros((), dtype=self._config.dtype, device=self._device)
        of_type = "layer_type" in inspect.signature(module.forward).parameters
        types = [{"layer_type": kind} for kind in dict.fromkeys(getattr(text, "layer_types", None) or ()) if of_type]
        for count in dict.fromkeys((min(there, length + FUTURE_TOKENS), length)):
            positions = torch.arange(count, device=self._device)[None]
            if self._config.uses_mrope:
                positions = positions.expand(self._config.mrope_num_dims, 1, -1)
            for kind in types or [{}]:
                angles = module(like, positions, **kind)
                if isinstance(angles, tuple):
                    # Without the dimensions of the batch, and of the positions of M-RoPE, which are equal for text.
                    yield tuple(angle[(0,) * (angle.dim() - 2)] for angle in angles)


def _tables(module: nn.Module) -> list[Tensor]:
    """What vLLM's own modules hold: cosines, then sines (positions, rotary_dim), scaling included."""
    width: int | None = getattr(module, "rotary_dim", None)
    tables: list[Any] = [getattr(module, "cos_sin_cache", None)]
    if isinstance(both := getattr(module, "long_short_cos_sin_cache", None), Tensor):  # LongRoPE
        short: Any = module.original_max_position_embeddings
        tables = [both[:short], both[short:]]
    return [table for table in tables if isinstance(table, Tensor) and table.dim() == 2 and table.shape[1] == width]


def _takes_positions(module: nn.Module) -> bool:
    """Whether it is one of transformers' rotary embeddings: frequencies, and angles of positions made from them."""
    frequencies = any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    return frequencies and list(inspect.signature(module.forward).parameters)[:2] == ["x", "position_ids"]
