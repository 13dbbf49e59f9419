"""Which prompt tokens of a request are compressed, and into how many blocks. Scheduler and workers both ask here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.sculpt.budgets import span_sizes

RECOMPUTED_TOKENS = 1024
"""A prompt found in the prefix cache computes this many of its last tokens anew, so that queries are seen. Entries that
no seen query looks for are lost (measured on one 2,048-token context: KL 0.0139 with 512, 0.0023 with 1,024, 0.0012
with all)."""


FEWEST_TRIGRAMS = 8
"""A prompt with fewer different runs of three tokens stays exact. All its queries are nearly alike, held-out ones, too,
and an answer's are others (measured: patterns of 1 to 3 tokens have KL 0.02 to 1, of 8 and more 0.01 and less)."""

MOST_SEGMENTS = 1024
"""Packed prefixes that are kept for others to find, at most: a worker's directory has room for so many, and for one of
every running request."""


@dataclass(frozen=True)
class Span:
    """The part of a prompt that gets compressed."""

    tokens: int  # a whole number of blocks
    blocks: int
    packed_blocks: int  # blocks that the packed prefix takes

    def pays(self, own_blocks: int) -> bool:
        """Whether a compression saves memory that frees so many of the span's blocks; others hold the rest."""
        return own_blocks > self.packed_blocks


def plan_span(
    config: CompressionConfig, num_prompt_tokens: int, block_size: int, max_tokens: int | None = None
) -> Span | Reason:
    """The span of a prompt, or why the prompt stays as it is. The tail keeps at least `window` prompt tokens.

    `max_tokens` is how long the answer may be.
    """
    if not config.active:
        return Reason.OFF
    if num_prompt_tokens < config.min_tokens:
        return Reason.SHORT
    blocks, packed_blocks = span_sizes(num_prompt_tokens, config.window, block_size, config.keep_ratio)
    if packed_blocks >= blocks:
        return Reason.NOTHING_TO_FREE
    # The prefill gives one token, the step that solves another: nothing would read the prefix.
    if max_tokens is not None and max_tokens <= 2:
        return Reason.FEW_OUTPUT_TOKENS
    return Span(blocks * block_size, blocks, packed_blocks)


def is_repetition(tokens: Sequence[int]) -> bool:
    """Whether a prompt is a few tokens over and over, so that it has fewer than `FEWEST_TRIGRAMS` runs of three."""
    trigrams = set()
    for trigram in zip(tokens, tokens[1:], tokens[2:], strict=False):
        trigrams.add(trigram)
        if len(trigrams) == FEWEST_TRIGRAMS:
            return False
    return True


def longest_useful_hit(num_prompt_tokens: int, block_size: int) -> int:
    """Tokens a prefix-cache hit may cover, whole blocks, if the prompt is to be compressed."""
    return max(num_prompt_tokens - RECOMPUTED_TOKENS, 0) // block_size * block_size
