"""Which tokens of a request become a segment, and into how many blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.sculpt import chain
from kvsculpt_vllm.sculpt.budgets import blocks_kept

FEWEST_TRIGRAMS = 8
"""A prompt with fewer different runs of three tokens stays exact. All its queries are nearly alike, held-out ones, too,
and an answer's are others (measured: patterns of 1 to 3 tokens have KL 0.02 to 1, of 8 and more 0.01 and less)."""

MOST_SEGMENTS = 1024
"""Segments that are kept for others to find, at most: a worker's directory has room for so many, and for those of every
running request."""

MOST_OWN_SEGMENTS = 64
"""Segments that a running request may hold and nobody else finds, at most, on average over all of them."""


FALL = 1.8
"""How fast held-out errors fall with the fraction f that is kept, as a power of (1 - f) / f: measured 1.7 to 2.2 on two
models and two texts, from f = 0.14 to 0.72 (benchmarks/LOG.md)."""

AIM = 0.9
"""Fraction of the error allowed that a segment which lost too much is made for. Another solve costs more than entries
that were not needed."""


@dataclass(frozen=True)
class Span:
    """The tokens that a segment is to stand for, in whole blocks."""

    first: int  # block of the request's list that it begins with
    blocks: int
    packed_blocks: int  # blocks that its entries take
    block_size: int
    followed: bool = False  # whether others are to come behind it

    @property
    def end(self) -> int:
        """The block behind it."""
        return self.first + self.blocks

    @property
    def first_token(self) -> int:
        """The position that it begins at."""
        return self.first * self.block_size

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.blocks * self.block_size

    @property
    def end_token(self) -> int:
        """The position behind it."""
        return self.end * self.block_size

    def grown(self, error: float, allowed: float) -> Span | None:
        """The same segment with as many entries as should bring its held-out error down to what is `allowed`, or a copy
        of everything where others are to follow; None where that would free nothing.

        At the fraction f an error is about in proportion to ((1 - f) / f) to the power of `FALL`.
        """
        odds = (self.blocks / self.packed_blocks - 1) * (AIM * allowed / error) ** (1 / FALL)
        # At least one more, or it would never end. What the law says is not to be believed far from where it was
        # measured, so no more than twice as many.
        packed = min(max(math.ceil(self.blocks / (1 + odds)), self.packed_blocks + 1), 2 * self.packed_blocks)
        if packed < self.blocks:
            return replace(self, packed_blocks=packed)
        return replace(self, packed_blocks=self.blocks) if self.followed and self.packed_blocks < self.blocks else None

    def pays(self, own_blocks: int) -> bool:
        """Whether a compression saves memory that frees so many of the span's blocks; others hold the rest."""
        return own_blocks > self.packed_blocks


def why_exact(
    config: CompressionConfig, num_tokens: int, block_size: int, max_tokens: int | None = None
) -> Reason | None:
    """Why nothing of a context of `num_tokens` is compressed; None where something is.

    `max_tokens` is how long the answer may be.
    """
    if not config.active:
        return Reason.OFF
    if num_tokens < config.min_tokens:
        return Reason.SHORT
    span = next_span(config, num_tokens, block_size)
    if config.kept(num_tokens) == 1 or span is None or span.packed_blocks >= span.blocks:
        return Reason.NOTHING_TO_FREE
    # The prefill gives one token, the step that solves another: nothing would read the segment.
    if max_tokens is not None and max_tokens <= 2:
        return Reason.FEW_OUTPUT_TOKENS
    return None


def next_span(
    config: CompressionConfig,
    num_tokens: int,
    block_size: int,
    chain_blocks: int = 0,
    chain_packed: int = 0,
    num_prompt: int | None = None,
) -> Span | None:
    """The next segment of a context of `num_tokens` behind a chain that stands for `chain_blocks` and takes
    `chain_packed`; None where too little is left. The tail keeps at least `window` tokens. What is behind the first
    `num_prompt` tokens was written; None means nothing.

    What is left behind a chain stays exact until it has `min_tokens`, or a segment's length where that is less.
    """
    kept = config.kept(num_tokens)
    if (of_answers := config.kept_of_answers) is not None:
        first, end = chain_blocks * block_size, num_tokens - config.window
        written = 0 if num_prompt is None else max(0, end - max(first, num_prompt))
        if written:
            kept += (of_answers - kept) * written / (end - first)
        # What is written has its own fraction, whatever is in front of it; and what answers keep beyond a prompt's
        # fraction is not taken from prompts that follow them.
        own = blocks_kept(kept, chain_blocks) if chain_blocks else 0
        chain_packed = own if written else min(chain_packed, own)
    piece = chain.next_piece(
        num_tokens,
        config.window,
        block_size,
        kept,
        config.segment_tokens,
        chain_blocks=chain_blocks,
        chain_packed=chain_packed,
    )
    left = num_tokens - config.window - chain_blocks * block_size
    if piece is None or (chain_blocks and left < min(config.min_tokens, config.segment_tokens)):
        return None
    return Span(piece.first, piece.blocks, piece.packed_blocks, block_size, piece.followed)


def most_blocks(config: CompressionConfig, num_tokens: int, block_size: int) -> int:
    """Blocks that a context takes at most that is compressed while it is computed: what the segments before have, and
    one with its exact blocks, the window behind it, and the blocks that are filled.
    """
    config = config.at_most
    end = packed = most = 0
    window = -(-config.window // block_size)
    while (span := next_span(config, num_tokens, block_size, end, packed)) is not None:
        most = max(most, packed + span.blocks + window + span.packed_blocks)
        end, packed = span.end, packed + span.packed_blocks
    return max(most, packed + -(-num_tokens // block_size) - end)


GROWTH = 2
"""Blocks that a request takes besides: one that its answer grows into, and one for a chunk that ends in the middle."""


def blocks_up_to(config: CompressionConfig, num_tokens: int, block_size: int) -> int:
    """Blocks that a context takes at most on its way to `num_tokens`: a prompt of any length up to there, and an answer
    behind it.
    """
    return max(most_blocks(config, tokens, block_size) for tokens in _lengths(config, num_tokens, block_size)) + GROWTH


@lru_cache
def longest_context(config: CompressionConfig, block_size: int, blocks: int, most: int, packs: bool) -> int:
    """Tokens that a request with these settings may come to, prompt and answer, if there are so many blocks for it; at
    most `most`.

    `packs` says whether what is written is compressed, too. If it is not, a request is reckoned as exact: its prompt
    may be short and its answer long.
    """
    exact = min(most, blocks * block_size)
    if exact == most or not packs or why_exact(config, most, block_size) is not None or config.min_tokens > exact:
        return exact
    longest = exact
    for tokens in _lengths(config, most, block_size):
        if tokens > exact:
            if most_blocks(config, tokens, block_size) + GROWTH > blocks:
                break
            longest = tokens
    return longest


def _lengths(config: CompressionConfig, last: int, block_size: int) -> Iterator[int]:
    """Lengths to look at. The need does not grow evenly: a context just too short for one more segment takes more than
    one that has it.
    """
    yield from range(1, last, max(1, config.segment_tokens // 4 // block_size) * block_size)
    yield last


def is_repetition(tokens: Sequence[int]) -> bool:
    """Whether a prompt is a few tokens over and over, so that it has fewer than `FEWEST_TRIGRAMS` runs of three."""
    trigrams = set()
    for trigram in zip(tokens, tokens[1:], tokens[2:], strict=False):
        trigrams.add(trigram)
        if len(trigrams) == FEWEST_TRIGRAMS:
            return False
    return True
