"""What became of a request's prompt, as its own answer tells in `kv_transfer_params`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvsculpt_vllm.engine.shared.reasons import Outcome, Reason

FIELD = "kv_compression"
"""Of the answer's `kv_transfer_params`, which vLLM hands from the scheduler to the client as they are."""


@dataclass(frozen=True)
class Story:
    """The figures are those of what the request read at its end."""

    outcome: Outcome
    reason: Reason | None = None
    tokens_found: int = 0  # whose segments were there, so that they were not computed or not sculpted
    tokens_read: int = 0  # of these, whose segments were read from the store for this request
    tokens_sculpted: int = 0  # that were sculpted for this request
    segments: int = 0  # that its block list begins with
    entries_held: int = 0  # in them, mean over layers and KV heads
    pinned: bool = False  # its segments are not evicted: of a prefix that was sculpted for that
    held_out_error: float = 0.0  # the largest of these segments

    def told(self, prompt_tokens: int) -> dict[str, Any]:
        """Plain values, to become JSON."""
        plain = asdict(self) | {"outcome": str(self.outcome), "reason": str(self.reason or "")}
        return {FIELD: {"prompt_tokens": prompt_tokens, **plain}}
