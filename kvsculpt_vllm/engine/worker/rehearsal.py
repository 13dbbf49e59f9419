"""What a server would refuse a model for once it is loaded, told from its configuration alone.

The model is built without its weights: what stands for them takes no memory. The checks are those of a server's start,
on attention layers that turn random queries as the real ones are turned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from vllm.config import VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from kvsculpt_vllm.engine.shared.groups import has_windows
from kvsculpt_vllm.engine.startup.refusals.layers import check_attention_layers
from kvsculpt_vllm.engine.worker.model_rotary import parents_of, replaced_forwards, rotary_of_layers

LARGE = 1 << 20
"""Elements from which on a weight is only stood for."""


def rehearse(vllm_config: VllmConfig) -> int:
    """Check a model's layers and positions as a worker does that has loaded it; returns how many layers there are.

    Args:
        vllm_config: of one rank, for a model without quantised weights, which has attention layers of the same kinds.

    Raises:
        UnsupportedFeature: what a server's start would raise.
    """
    device, dtype = vllm_config.device_config.device, vllm_config.model_config.dtype
    assert isinstance(device, torch.device) and isinstance(dtype, torch.dtype)  # vLLM has resolved what was asked for
    with _one_rank(vllm_config), torch.no_grad():
        with set_default_torch_dtype(dtype), device, _LargeOnMeta():
            model = initialize_model(vllm_config).eval()
        layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
        if has_windows(vllm_config):  # those that see one are left alone
            layers = {name: layer for name, layer in layers.items() if getattr(layer, "sliding_window", None) is None}
        check_attention_layers(layers)
        experts = _siblings_with_experts(model, layers)
        _stand_in_for_weights(model, set().union(*(part.modules() for part in experts)), device)
        runner = SimpleNamespace(
            vllm_config=vllm_config,
            device=device,
            get_model=lambda: model,
            maybe_dummy_run_with_lora=lambda *args: nullcontext(),
        )
        with replaced_forwards(dict.fromkeys(experts, _unchanged)):
            rotary_of_layers(runner, layers)
    return len(layers)


class _LargeOnMeta(TorchFunctionMode):
    """Makes large empty tensors, as weights are before they are loaded, without memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            (shape,) = args if args and isinstance(args[0], (tuple, list)) else (args or kwargs.get("size", ()),)
            if math.prod(shape) >= LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _siblings_with_experts(model: nn.Module, layers: dict[str, Any]) -> list[nn.Module]:
    """The feed-forward parts, beside attention, that have a weight for each of several experts.

    What is routed where is nothing to attention, and vLLM makes such weights ready in a way of their own.
    """
    parents = parents_of(model)
    owners = {parents[layer] for layer in layers.values()}
    around = {parents[owner] for owner in owners if owner in parents}
    beside = [part for whole in around for part in whole.children() if not owners & set(part.modules())]
    return [part for part in beside if any(weight.dim() > 2 for weight in part.parameters())]


def _unchanged(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _stand_in_for_weights(model: nn.Module, left_out: set[nn.Module], device: torch.device) -> None:
    """Give every weight random values; a large one of shape (m, …) has m of them, each repeated along its row."""
    torch.manual_seed(0)
    modules = [module for module in model.modules() if module not in left_out]
    for weight in (weight for module in modules for weight in module.parameters(recurse=False) if not weight.is_meta):
        # Norms too: one that comes after the rotation would go unseen if it scaled all elements alike.
        nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.3)
    for module in modules:
        large = [(name, weight) for name, weight in module.named_parameters(recurse=False) if weight.is_meta]
        for name, weight in large:
            column = torch.randn(len(weight), *(1,) * (weight.dim() - 1), dtype=weight.dtype, device=device)
            module.register_parameter(name, nn.Parameter(column.expand(weight.shape), requires_grad=False))
        method = getattr(module, "quant_method", None)
        if large and isinstance(module, LinearBase):
            module.quant_method = _EqualColumns()
        elif not large and isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)


class _EqualColumns(LinearMethodBase):
    """Multiplies by a weight whose columns are all the same, without reading more than one of them."""

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM's; the layer has them already."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The products (…, m) of `x` (…, n) with the layer's weight (m, n)."""
        product = x.sum(-1, keepdim=True) * layer.weight[:, 0]
        return product if bias is None else product + bias


@contextmanager
def _one_rank(vllm_config: VllmConfig) -> Iterator[None]:
    """vLLM's models ask which rank they are on."""
    with TemporaryDirectory() as folder, set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        try:
            initialize_model_parallel(1, 1)
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()
