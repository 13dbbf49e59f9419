"""How fast compressions were, to tell whether the next one would be over before its request's answer."""

from __future__ import annotations

import math

from kvsculpt_vllm.config import CompressionConfig

SHARE = 0.5
"""Weight of the newest compression in the running average."""


class Speed:
    """Seconds a span token, by method and effort: a solve's work grows with both, and with the prompt."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], float] = {}

    def heard(self, config: CompressionConfig, span_tokens: int, seconds: float) -> None:
        """A compression took so long."""
        key, now = (config.method, config.effort), seconds / span_tokens
        before = self._seconds.get(key, now)
        self._seconds[key] = SHARE * now + (1 - SHARE) * before

    def steps(self, config: CompressionConfig, span_tokens: int) -> int:
        """Steps that a compression would be spread over where each may be held up for the server's `max_stall_ms`; 0
        where nothing of its kind was measured yet.
        """
        seconds = self._seconds.get((config.method, config.effort), 0.0) * span_tokens
        # With a bound of 0 a step still gets one slice of the work.
        return math.floor(seconds / max(config.max_stall_ms / 1000, 0.01))
