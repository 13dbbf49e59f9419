"""Which of vLLM's names for the KV cache's dtype mean the FP8 that entries can be sculpted for."""

from __future__ import annotations

from typing import Any

IN_FP8 = ("fp8", "fp8_e4m3")


def is_fp8(vllm_config: Any) -> bool:
    """Whether the KV cache holds FP8 (E4M3)."""
    return vllm_config.cache_config.cache_dtype in IN_FP8
