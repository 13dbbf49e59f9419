"""Put our routes into vLLM's API server wherever an engine compresses, without a variable having to name us."""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm import plugins

from kvsculpt_vllm.engine.hooks import compresses_here


def install() -> None:
    """Wrap `vllm.plugins.load_endpoint_plugins`, once per process.

    vLLM loads endpoint plugins only where `VLLM_PLUGINS` names them, because they add routes that an operator did not
    ask for. Ours are asked for by `--kv-compression`, and without it nothing is added.
    """
    stock = plugins.load_endpoint_plugins
    if hasattr(stock, "kvsculpt_hook"):
        return

    @wraps(stock)
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> list[Any]:
        loaded = stock(*args, **kwargs)
        if compresses_here():
            from kvsculpt_vllm.serving.endpoints import SculptEndpoints

            loaded.append(SculptEndpoints())
        return loaded

    load_endpoint_plugins.kvsculpt_hook = True
    plugins.load_endpoint_plugins = load_endpoint_plugins
