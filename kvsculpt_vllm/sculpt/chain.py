"""Where a context is cut into segments, and how many blocks each segment is packed into.

Engine and evaluation both ask here, so that what is measured is what is served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvsculpt_vllm.sculpt.budgets import blocks_kept

AGES = (1.9, 1.0, 0.75)
"""What a segment keeps of its entries, compared with the others of its chain: the last one, the one before it, all
before those. What is recent is read most. Chosen by the KL of 7,900 tokens in four segments, budgets by a calibration
that has curves of both kinds: 16, 16, 16 and 26 blocks 0.00021, 14, 14, 18 and 28 blocks 0.00018, 12, 12, 22 and 28
blocks 0.00018 (benchmarks/LOG.md)."""

LEAST, MOST = 0.6, 2.5
"""A segment keeps at least and at most so many times the keep ratio."""


SEGMENT, LONG_SEGMENT = 2048, 4096
"""Tokens of a segment. A chain of longer ones loses less (benchmarks/LOG.md); more of a prompt is exact meanwhile, and
the solve takes more memory."""

SMALL_MODEL = 1 << 15
"""A model that has so many numbers in all its queries at one position, or fewer, makes long segments: in 16 bits those
of the longest take 388 MiB then. It is what Llama-3.2-1B has."""


def segment_for(query_numbers: int) -> int:
    """Tokens of a segment, for a model whose queries at one position are so many numbers: layers x query heads x head
    size, on one rank.
    """
    return LONG_SEGMENT if query_numbers <= SMALL_MODEL else SEGMENT


def longest(segment: int) -> int:
    """Tokens that a segment stands for at most (see `next_piece`)."""
    return segment * 3 // 2


@dataclass(frozen=True)
class Piece:
    """A segment to be made: a run of whole blocks of the context."""

    first: int  # the block it begins with
    blocks: int  # that it stands for
    packed_blocks: int  # that its entries take
    followed: bool = False  # whether others come behind it

    @property
    def end(self) -> int:
        """The block behind it."""
        return self.first + self.blocks


def next_piece(
    num_tokens: int,
    window: int,
    block_size: int,
    keep_ratio: float,
    segment: int,
    *,
    chain_blocks: int = 0,
    chain_packed: int = 0,
) -> Piece | None:
    """Choose the next segment of a context of `num_tokens`, behind a chain that stands for `chain_blocks` and takes
    `chain_packed`; None where no whole block is left.

    At least the last `window` tokens stay outside. A segment stands for `segment` tokens. What would be left over and
    is less than half of that goes with the last one: short segments lose more. The keep ratio is the fraction of all of
    the chain's blocks. What the chain has left of it, the segments to come share by their `AGES`, within bounds. A
    chain that goes on behind what was the last segment once has less to give until it has grown.
    """
    each = max(1, segment // block_size)
    left = max(num_tokens - window, 0) // block_size - chain_blocks
    if left <= 0:
        return None
    before_last = max(0, (2 * left - each) // (2 * each))  # segments to come before the last one
    last, next_to_last, aged = _ages(keep_ratio)
    shares = (left - before_last * each) * last
    if before_last:
        shares += each * (next_to_last + (before_last - 1) * aged)
    age = (last, next_to_last, aged)[min(before_last, 2)]
    blocks = each if before_last else left
    rest = blocks_kept(keep_ratio, chain_blocks + left) - chain_packed
    packed = round(rest / shares * age * blocks)  # what rounding gives or takes, the later ones have less or more
    least, most = blocks_kept(LEAST * keep_ratio, blocks), blocks_kept(MOST * keep_ratio, blocks)
    return Piece(chain_blocks, blocks, min(max(packed, least), most, blocks), followed=before_last > 0)


def _ages(keep_ratio: float) -> tuple[float, ...]:
    """`AGES` at a keep ratio. Above a third they draw near to each other: the last segment has less to take in."""
    far = min(1.0, (1 - keep_ratio) / (2 * keep_ratio))
    return tuple(1 + far * (age - 1) for age in AGES)


def pieces(num_tokens: int, window: int, block_size: int, keep_ratio: float, segment: int) -> Iterator[Piece]:
    """All segments of a context that is sculpted from its beginning."""
    end = packed = 0
    while piece := next_piece(
        num_tokens, window, block_size, keep_ratio, segment, chain_blocks=end, chain_packed=packed
    ):
        yield piece
        end, packed = piece.end, packed + piece.packed_blocks
