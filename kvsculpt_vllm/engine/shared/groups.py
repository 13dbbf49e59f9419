"""Models of which some layers see everything and the others a window: which are compressed, and where they lie.

vLLM gives such a model several KV cache groups out of one pool, each with block lists of its own. A block of any group
holds as many layers. Segments live in the group of the layers that see everything; windows are bounded anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsculpt_vllm.layer_kinds import FULL, WINDOW, full_layers


def has_windows(vllm_config: Any) -> bool:
    """Whether some layers of the model see a window, and others everything."""
    model = vllm_config.model_config
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ())
    return model.get_sliding_window() is not None and {FULL, WINDOW} <= kinds


def compressed_layers(model_config: Any) -> list[int]:
    """The layers that see everything, by their numbers in the model. A window that no context outgrows is none."""
    text = model_config.hf_text_config
    return list(range(text.num_hidden_layers)) if model_config.get_sliding_window() is None else full_layers(text)


def full_group(groups: Sequence[Any]) -> int:
    """Which of the KV cache groups is that of full attention. There is one, see `check_kv_cache_config`."""
    full = (i for i, group in enumerate(groups) if getattr(group.kv_cache_spec, "sliding_window", None) is None)
    return next(full, 0)
