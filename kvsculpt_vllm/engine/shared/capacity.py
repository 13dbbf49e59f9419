"""How long a request may become in the KV cache's memory, in which its compressed part takes less than stock vLLM asks.

Start-up, the front end's requests and the scheduler all ask here.
"""

from __future__ import annotations

from typing import Any

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared import spans
from kvsculpt_vllm.engine.shared.groups import has_windows
from kvsculpt_vllm.engine.shared.rank_shape import RankShape


def server_settings(vllm_config: Any, blocks: int | None = None) -> CompressionConfig:
    """A server's settings, with the length of segments that auto means for its model: the long ones of a small model,
    or short ones where the KV cache's `blocks` are too few for its longest context in long ones. None for blocks that
    nobody has counted yet.
    """
    config = CompressionConfig.from_additional_config(vllm_config.additional_config)
    if not config.active or config.segment != "auto":
        return config
    of_model = config.for_model(RankShape.of(vllm_config).query_numbers)
    short = config.in_short_segments()
    if blocks is None or short is None or not outgrows_memory(vllm_config, config):
        return of_model
    return of_model if blocks_of_longest(vllm_config, of_model) <= blocks else short


def blocks_of_longest(vllm_config: Any, config: CompressionConfig) -> int:
    """Blocks that a context of --max-model-len tokens takes at most on its way there, where it is compressed."""
    block_size, longest = vllm_config.cache_config.block_size, vllm_config.model_config.max_model_len
    if spans.why_exact(config, longest, block_size) is not None:
        return -(-longest // block_size)
    needed = spans.blocks_up_to(config, longest, block_size)
    return max(needed, -(-config.min_tokens // block_size))  # what is shorter stays exact


def packs_answers(vllm_config: Any, config: CompressionConfig) -> bool:
    """Whether what follows a prompt is compressed as it grows: it is computed anew then, and has to find its chain."""
    return config.active and config.decode > 0 and bool(vllm_config.cache_config.enable_prefix_caching)


def outgrows_memory(vllm_config: Any, config: CompressionConfig) -> bool:
    """Whether a request may come to be longer than the KV cache's memory. Where layers have windows of their own it may
    not: it is reckoned as exact.
    """
    return packs_answers(vllm_config, config) and not has_windows(vllm_config)


def most_tokens(vllm_config: Any, config: CompressionConfig, blocks: int, is_found_again: bool = True) -> int:
    """Tokens, prompt and answer, that a request with these settings may come to where there are so many blocks.

    `is_found_again` says whether its tokens tell all of it, so that it finds its chain when it is computed anew.
    """
    return spans.longest_context(
        config,
        vllm_config.cache_config.block_size,
        blocks,
        vllm_config.model_config.max_model_len,
        is_found_again and outgrows_memory(vllm_config, config),
    )


def blocks_of_engine(vllm_config: Any) -> int | None:
    """Blocks that one engine's requests have; None in a process that has not been told."""
    blocks = vllm_config.cache_config.num_gpu_blocks
    # vLLM adds up those of all data parallel engines in the front end. The null block serves nobody.
    engines = vllm_config.parallel_config.data_parallel_size
    return blocks // engines - 1 if blocks else None
