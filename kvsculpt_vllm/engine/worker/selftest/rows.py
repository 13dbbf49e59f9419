"""Rows of a batch for the self-test of attention: chains of several segments, one, and none, laid out in the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvsculpt_vllm.engine.worker.directory import Directory
from kvsculpt_vllm.engine.worker.pages import place
from kvsculpt_vllm.engine.worker.selftest.subject import Subject
from kvsculpt_vllm.kernels.attention_plan import BatchRows, prefill_tile, prefill_tiles

CHAIN, BARE, SHORT, ONE = range(4)
"""The rows: a chain of three segments and a long tail; no segment; one segment and a tail of one token, the first of
its block; one token alone."""

SPANS = {CHAIN: (3, 1, 2), BARE: (), SHORT: (2,), ONE: ()}
"""The blocks that each row's segments stand for."""


class Batch(NamedTuple):
    """A step's rows as attention gets them. Behind the rows and their tokens there may be padding."""

    query: Tensor  # (T, heads, D)
    rows: BatchRows
    num_rows: int  # without padding

    @property
    def num_tokens(self) -> int:
        """Of the queries, without padding."""
        return self.rows.num_tokens

    def without_padding(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, block table, where each row's queries begin, and the rows' lengths, without padding."""
        count, rows = self.num_rows, self.rows
        return (
            self.query[: self.num_tokens],
            rows.block_table[:count],
            rows.query_start_loc[: count + 1],
            rows.seq_lens[:count],
        )


class Rows:
    """Four rows in the cache's blocks at both ends, and the directory of their segments."""

    def __init__(self, subject: Subject, generator: torch.Generator) -> None:
        self.subject, self._generator = subject, generator
        subject.fill(generator)
        geometry, size = subject.geometry, subject.geometry.block_size
        self.tile = prefill_tile(subject.group)
        tails = {CHAIN: max(size + size // 2, self.tile + 3), BARE: 2 * size + size // 2, SHORT: 1, ONE: 1}
        self.tokens = [sum(SPANS[row]) * size + tails[row] for row in SPANS]
        columns = max(subject.table_columns, *(-(-tokens // size) for tokens in self.tokens))
        # As many slots as segments, and one for a segment that takes another's place.
        slots = sum(map(len, SPANS.values())) + 1
        self.directory = Directory(subject.num_blocks, slots, geometry.num_layers, geometry.num_heads, subject.device)
        table = torch.zeros(len(SPANS), columns, dtype=torch.int32)
        free = _from_both_ends(subject.blocks[1:])
        for row, spans in SPANS.items():
            column = 0
            for span in spans:
                lengths = torch.randint(1, span + 1, (geometry.num_cells,), generator=generator)
                packed = [free.pop() for _ in range(-(-int(lengths.sum()) // geometry.num_cells))]
                table[row, column : column + len(packed)] = torch.tensor(packed)
                self.publish(packed[0], lengths, span)
                column += span
            for own in range(column, -(-self.tokens[row] // size)):
                table[row, own] = free.pop()
        self.table = table.to(subject.device)

    def publish(self, first_block: int, lengths: Tensor, span: int) -> None:
        """Enter a segment of `lengths` (L·H,) pages, one head's after the other, under its first block, in the place of
        another one if there is one.
        """
        shape = self.subject.geometry.num_layers, self.subject.geometry.num_heads
        starts = torch.tensor(place(lengths.tolist()))
        self.directory.prepare("self-test", starts.view(shape), lengths.view(shape), span)
        self.directory.publish("self-test", first_block)

    def batch(self, *picked: tuple[int, int], padding: int = 1) -> Batch:
        """Some rows, each with a number of new tokens, and so many rows and tokens that are padding. Queries lie beside
        keys and values, as a projection leaves them.
        """
        subject = self.subject
        rows, new = [row for row, _ in picked], [count for _, count in picked]
        width = subject.num_query_heads + 2 * subject.geometry.num_heads
        projected = subject.normal(sum(new) + padding, width, subject.head_size, generator=self._generator)
        begins = torch.tensor([0, *new, *[0] * padding]).cumsum(0)
        lengths = torch.tensor([*(self.tokens[row] for row in rows), *[0] * padding])
        tiles = prefill_tiles(begins, subject.group)
        batch_rows = BatchRows(
            torch.cat([self.table[rows], self.table.new_zeros(padding, self.table.shape[1])]),
            begins.to(subject.device, torch.int32),
            lengths.to(subject.device, torch.int32),
            tiles.to(subject.device) if len(tiles) else None,
            1 in new,
            sum(new),
        )
        return Batch(projected[:, : subject.num_query_heads], batch_rows, len(rows))


def _from_both_ends(blocks: list[int]) -> list[int]:
    """The same blocks, to be popped in turn from their end and from their beginning."""
    turns = [blocks[~(turn // 2)] if turn % 2 == 0 else blocks[turn // 2] for turn in range(len(blocks))]
    return turns[::-1]
