"""How many positions' queries are kept at once."""

from __future__ import annotations

from typing import Any

import torch

from kvsculpt_vllm.config import CompressionConfig

CPU_BYTES = 4 << 30
"""What the queries of all prompts that are computed or wait for their compression may take in a CPU's memory."""

SEGMENTS = 2
"""On a GPU there is room for the queries of so many segments: one that is made, and one that is computed meanwhile."""


def position_bytes(vllm_config: Any) -> int:
    """Bytes that the queries of one position take on the rank that has most of them."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    assert isinstance(model.dtype, torch.dtype)  # and no name any more: vLLM has resolved it
    numbers = model.get_num_layers(parallel) * model.get_num_attention_heads(parallel) * model.get_head_size()
    return numbers * model.dtype.itemsize


def longest_segment(config: CompressionConfig) -> int:
    """Tokens that one solve sees at most: a prompt's last segment may be half as long again (`chain.next_piece`), and
    the window is behind it.
    """
    return config.segment * 3 // 2 + config.window


def positions(vllm_config: Any, config: CompressionConfig) -> int:
    """Positions that all requests together may have queries kept of."""
    if vllm_config.device_config.device_type == "cpu":
        return CPU_BYTES // position_bytes(vllm_config)
    return positions_on_gpu(config)


def positions_on_gpu(config: CompressionConfig) -> int:
    """Positions that all requests together may have queries kept of on a GPU, whatever the model."""
    return SEGMENTS * longest_segment(config)
