"""How many positions' queries are kept at once."""

from __future__ import annotations

from typing import Any

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.rank_shape import RankShape
from kvsculpt_vllm.sculpt import chain

CPU_BYTES = 4 << 30
"""What the queries of all prompts that are computed or wait for their compression may take in a CPU's memory."""

SEGMENTS = 2
"""On a GPU there is room for the queries of so many segments: one that is made, and one that is computed meanwhile."""


def longest_segment(config: CompressionConfig) -> int:
    """Tokens that one solve sees at most: the window is behind a segment."""
    return chain.longest(config.segment_tokens) + config.window


def positions(vllm_config: Any, config: CompressionConfig) -> int:
    """Positions that all requests together may have queries kept of."""
    if vllm_config.device_config.device_type == "cpu":
        return CPU_BYTES // RankShape.of(vllm_config).position_bytes
    return positions_on_gpu(config)


def positions_on_gpu(config: CompressionConfig) -> int:
    """Positions that all requests together may have queries kept of on a GPU, whatever the model."""
    return SEGMENTS * longest_segment(config)
