"""How fast compressions were, to tell whether the next one would be over before its request's answer."""

from __future__ import annotations

import math

from kvsculpt_vllm.config import CompressionConfig

SHARE = 0.5
"""Weight of the newest compression in the running average."""


DOUBT = 0.8
"""By what an estimate shrinks with every request that is put off because of it: else one slow measurement, of a machine
that was busy, could keep all from being begun, and nothing be measured again."""


class Speed:
    """Seconds a span token, by method and effort: a solve's work grows with both, and with the prompt."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], float] = {}
        self._begun: set[tuple[str, str]] = set()

    def heard(self, config: CompressionConfig, span_tokens: int, seconds: float) -> None:
        """A compression took so long. The first one of its kind does not count: it may have compiled kernels."""
        key, now = (config.method, config.effort), seconds / span_tokens
        if key not in self._begun:
            self._begun.add(key)
            return
        before = self._seconds.get(key, now)
        self._seconds[key] = SHARE * now + (1 - SHARE) * before

    def doubt(self, config: CompressionConfig) -> None:
        """A request was put off because of the estimate of its kind."""
        key = (config.method, config.effort)
        if key in self._seconds:
            self._seconds[key] *= DOUBT

    def steps(self, config: CompressionConfig, span_tokens: int) -> int:
        """Steps that a compression would be spread over where each may be held up for the server's `max_stall_ms`; 0
        where nothing of its kind was measured yet.
        """
        seconds = self._seconds.get((config.method, config.effort), 0.0) * span_tokens
        # With a bound of 0 a step still gets one slice of the work.
        return math.floor(seconds / max(config.max_stall_ms / 1000, 0.01))
