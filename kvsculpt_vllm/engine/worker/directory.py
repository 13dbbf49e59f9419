"""Which blocks begin a packed prefix, a segment of a block list, and where each (layer, KV head)'s pages are in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvsculpt_vllm.kernels.attention_plan import Prefixes
from kvsculpt_vllm.sculpt.transfer import on_device


class Chains(NamedTuple):
    """The segments that each row of a batch begins with, in their order; rows with fewer than S end with zeros."""

    starts: Tensor  # (R, S, L, H) int64, in cells
    lengths: Tensor  # (R, S, L, H) int64, in pages
    span_blocks: Tensor  # (R, S) int64, columns up to the next segment

    def of(self, rows: Tensor) -> Chains:
        """Those of some rows (n,)."""
        return Chains(*(tensor[rows] for tensor in self))


class Directory:
    """A table on the device of the packed prefixes that a batch's block lists hold.

    It is indexed by a packed prefix's first block, so that a step needs no work of the host for each row. Whoever's
    list has that block in the place of a segment reads it: several requests may. A list begins with a chain of
    segments, each with as many columns as the blocks that it stands for. The scheduler says when a first block holds
    something else. The entry of block 0 stays empty, because padded rows point at the null block. A prefix takes a
    slot; slot 0 says "none".
    """

    def __init__(self, num_blocks: int, num_slots: int, num_layers: int, num_heads: int, device: torch.device) -> None:
        shape = (num_slots + 1, num_layers, num_heads)
        # For kernels, which look rows up by themselves. Never replaced: a recorded graph holds their addresses.
        self.prefixes = Prefixes(
            *(torch.zeros(size, dtype=torch.int64, device=device) for size in (num_blocks, shape, shape, num_slots + 1))
        )
        self._free_slots = list(range(num_slots, 0, -1))
        self._prepared: dict[str, int] = {}  # request -> slot
        self._published: dict[int, int] = {}  # first block -> slot
        self._places: dict[int, tuple[list[int], list[int]]] = {}  # by slot, what the table says: to be read at once

    def __len__(self) -> int:
        return len(self._prepared) + len(self._published)

    def __contains__(self, first_block: int) -> bool:
        return first_block in self._published

    def prepare(self, request_id: str, starts: Tensor, lengths: Tensor, span_blocks: int) -> None:
        """Write down a packed prefix that no row reads yet; starts and lengths are (L, H), in pages.

        What can fail is done here, before the request has given up its exact cache.
        """
        self.release(request_id)
        slot = self._free_slots.pop()
        self._prepared[request_id] = slot
        table = self.prefixes
        device = table.starts.device
        table.starts[slot], table.lengths[slot] = on_device(starts, device), on_device(lengths, device)
        table.span_blocks[slot] = span_blocks
        self._places[slot] = starts.flatten().tolist(), lengths.flatten().tolist()

    def publish(self, request_id: str, first_block: int) -> None:
        """From now on, rows with a segment that begins with `first_block` read what was prepared."""
        self.forget(first_block)
        slot = self._published[first_block] = self._prepared.pop(request_id)
        self.prefixes.slot_of_block[first_block] = slot

    def release(self, request_id: str) -> None:
        """Forget what was prepared for a request and not published; unknown ones are fine."""
        if (slot := self._prepared.pop(request_id, None)) is not None:
            self._free_slots.append(slot)

    def places(self, first_block: int) -> tuple[list[int], list[int]]:
        """The first cell and the number of pages of every (layer, head) of a published segment, layers outermost."""
        return self._places[self._published[first_block]]

    def forget(self, first_block: int) -> None:
        """The block holds something else now; one that no packed prefix begins with is fine."""
        if (slot := self._published.pop(first_block, None)) is not None:
            self.prefixes.slot_of_block[first_block] = 0
            self._free_slots.append(slot)

    def chains(self, block_table: Tensor, row_blocks: Tensor) -> Chains | None:
        """Each row's chain, S being the longest one's length; None if no row begins with a segment.

        `block_table` is (R, W), and `row_blocks` (R,) says how many columns of it a row has: others may hold anything.
        """
        if not self._published:
            return None
        column, slots, last = torch.zeros_like(row_blocks, dtype=torch.int64), [], block_table.shape[1] - 1
        while True:
            block = block_table.gather(1, column.clamp_max(last)[:, None])[:, 0].long()
            slot = self.prefixes.slot_of_block[block.masked_fill(column >= row_blocks, 0)]
            if not slot.any():
                break
            slots.append(slot)
            column = column + self.prefixes.span_blocks[slot]  # slot 0 has none: that chain has ended
        if not slots:
            return None
        in_order, table = torch.stack(slots, 1), self.prefixes
        return Chains(table.starts[in_order], table.lengths[in_order], table.span_blocks[in_order])
