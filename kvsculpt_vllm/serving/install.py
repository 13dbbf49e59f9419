"""Put our routes into vLLM's API server wherever an engine compresses, without a variable having to name us."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvsculpt_vllm.engine.compat.patcher import apply
from kvsculpt_vllm.engine.compat.patches import LOAD_ENDPOINT_PLUGINS
from kvsculpt_vllm.engine.startup.hooks import compresses_here


def install() -> None:
    """Wrap `vllm.plugins.load_endpoint_plugins`, once per process.

    vLLM loads endpoint plugins only where `VLLM_PLUGINS` names them, because they add routes that an operator did not
    ask for. Ours are asked for by `--kv-compression`, and without it nothing is added.
    """
    apply(LOAD_ENDPOINT_PLUGINS, _with_ours)


def _with_ours(stock: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> list[Any]:
        loaded = stock(*args, **kwargs)
        if compresses_here():
            from kvsculpt_vllm.serving.endpoints import SculptEndpoints

            loaded.append(SculptEndpoints())
        return loaded

    return load_endpoint_plugins
