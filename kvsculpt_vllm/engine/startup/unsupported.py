"""In a vLLM that the plugin was not written for: leave it as it is, and refuse only where compression is asked for.

Nothing here may import from vLLM, or from what of ours does.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvsculpt_vllm.config import KEY, CompressionConfig, as_settings, flag
from kvsculpt_vllm.engine.compat.patcher import apply
from kvsculpt_vllm.engine.compat.patches import CREATE_ENGINE_CONFIG

logger = logging.getLogger("vllm.kvsculpt")


def stand_aside(unsupported: Exception) -> None:
    """Say once that nothing is compressed; from now on, an engine's configuration that asks for it is refused.

    vLLM's parser knows no flag of ours then, so flags are looked for here; one in a YAML file it refuses itself, after
    that line in the log. `additional_config` ends in `EngineArgs`, be it an argument, a flag or from a YAML file.

    Raises:
        Exception: `unsupported`, if a flag of ours is on the command line of vLLM.
    """
    program, *words = sys.argv or [""]
    if _is_vllms(program) and has_our_flags(words):
        raise unsupported
    told = f"KV compression: inactive. {unsupported}"
    try:
        apply(CREATE_ENGINE_CONFIG, _refusing(unsupported))
    except (ImportError, AttributeError):
        told += f" An entry {KEY} of additional_config has no effect."
    if multiprocessing.parent_process() is None:  # vLLM's other processes load its plugins, too
        logger.warning("%s", told)


def has_our_flags(words: Iterable[str]) -> bool:
    """Whether one of our flags is among the words of a command line, in any spelling that vLLM takes."""
    flags = {flag(field) for field in CompressionConfig.model_fields}
    return any(word.partition("=")[0].replace("_", "-") in flags for word in words)


def asks_for_compression(additional_config: Any) -> bool:
    """Whether an `additional_config` has settings of ours, wrong ones included, other than the method `none`."""
    entry = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    return entry is not None and as_settings(entry) != {"method": "none"}


def _is_vllms(program: str) -> bool:
    """Whether a process was started by vLLM's command or as one of its modules: another program's flags are its own."""
    spec = find_spec("vllm")
    folders = [Path(folder).resolve() for folder in spec.submodule_search_locations or ()] if spec else []
    path = Path(program)
    return path.stem == "vllm" or any(folder in path.resolve().parents for folder in folders)


def _refusing(unsupported: Exception) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            if asks_for_compression(getattr(self, "additional_config", None)):
                raise unsupported
            return stock(self, *args, **kwargs)

        return create_engine_config

    return make
