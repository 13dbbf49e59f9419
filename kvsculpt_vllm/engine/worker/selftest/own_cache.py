"""A small cache with a model's numbers, for a self-test without an engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsculpt_vllm.engine.worker.selftest.subject import END_BLOCKS, Subject

MIDDLE_BLOCKS = 8
"""Blocks of the cache that nothing is written to."""


@dataclass(frozen=True)
class Numbers:
    """What kernels are compiled for."""

    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype  # of queries
    soft_cap: float | None = None
    has_sinks: bool = False
    cache_dtype: torch.dtype | None = None  # where it is not that of queries

    @classmethod
    def of_model(cls, directory: Path) -> Numbers:
        """Those of a model in Hugging Face's format, on one device.

        Raises:
            ValueError: its config.json is missing, or does not say them.
        """
        file = directory / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            config = config.get("text_config", config)  # of a model that reads more than text
            heads = config["num_attention_heads"]
            return cls(
                config["num_hidden_layers"],
                heads,
                config.get("num_key_value_heads") or heads,
                config.get("head_dim") or config["hidden_size"] // heads,
                _dtype(config),
                config.get("attn_logit_softcapping"),
                config.get("model_type") == "gpt_oss",
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        except KeyError as missing:
            raise ValueError(f"{file} has no {missing}") from None


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype that vLLM serves a model in on a GPU: its own, if that has 16 bits."""
    name = config.get("dtype") or config.get("torch_dtype")
    return torch.float16 if name == "float16" else torch.bfloat16


def subject_of(numbers: Numbers, block_size: int, layout: str, device: torch.device) -> Subject:
    """The subject with an empty cache of its own, in the layout LBHNC or BLHNC."""
    views = own_cache(numbers, block_size, layout, device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6
    others = numbers.soft_cap, numbers.has_sinks, numbers.dtype
    return Subject.of(views, numbers.query_heads, 0, processors, *others)


def own_cache(numbers: Numbers, block_size: int, layout: str, device: torch.device) -> list[Tensor]:
    """An empty cache as vLLM would make it: of each layer a view (blocks, KV heads, block_size, 2D) of one buffer."""
    blocks, page = 2 * END_BLOCKS + MIDDLE_BLOCKS, (block_size, 2 * numbers.head_size)
    in_order = (numbers.layers, blocks) if layout == "LBHNC" else (blocks, numbers.layers)
    cache = torch.zeros(*in_order, numbers.kv_heads, *page, dtype=numbers.cache_dtype or numbers.dtype, device=device)
    return list(cache.unbind(0 if layout == "LBHNC" else 1))
