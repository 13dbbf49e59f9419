"""Where a context is cut into segments, and how many blocks each segment is packed into.

Engine and evaluation both ask here, so that what is measured is what is served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvsculpt_vllm.sculpt.budgets import blocks_kept

AGED = 0.8
"""A segment that others follow keeps this part of the keep ratio. What it gives up goes to the last segment, because
what is recent is read most (KL of 7,900 tokens of prose in segments of 2,048: 0.00067 where all keep as much, 0.00040
with this; 0.7 or more for the last but one makes no difference; benchmarks/LOG.md)."""

MOST_OF_THE_LAST = 2.0
"""The last segment keeps at most this many times the keep ratio. The others give up no more than it can take."""


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
    the chain's blocks: the last segment gets what the others have left of it, within bounds. A chain that goes on
    behind what was the last segment once has less to give until it has grown.
    """
    each = max(1, segment // block_size)
    left = max(num_tokens - window, 0) // block_size - chain_blocks
    if left <= 0:
        return None
    is_last = 2 * left < 3 * each
    blocks = left if is_last else each
    if not is_last:
        # No more than the last segment can take in, which is little of a high ratio, and of a part of many segments.
        more = min((MOST_OF_THE_LAST - 1) * keep_ratio, 1 - keep_ratio)  # that it may keep, of its blocks
        shared = more * each / (chain_blocks + left - each)  # between all before it
        given_up = min((1 - AGED) * min(keep_ratio, 1 - keep_ratio), shared)
        return Piece(chain_blocks, blocks, blocks_kept(keep_ratio - given_up, blocks), followed=True)
    rest = blocks_kept(keep_ratio, chain_blocks + blocks) - chain_packed
    least, most = blocks_kept(AGED * keep_ratio, blocks), blocks_kept(MOST_OF_THE_LAST * keep_ratio, blocks)
    return Piece(chain_blocks, blocks, min(max(rest, least), most, blocks))


def pieces(num_tokens: int, window: int, block_size: int, keep_ratio: float, segment: int) -> Iterator[Piece]:
    """All segments of a context that is sculpted from its beginning."""
    end = packed = 0
    while piece := next_piece(
        num_tokens, window, block_size, keep_ratio, segment, chain_blocks=end, chain_packed=packed
    ):
        yield piece
        end, packed = piece.end, packed + piece.packed_blocks
