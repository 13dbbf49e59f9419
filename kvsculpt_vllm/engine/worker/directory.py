"""Which block lists start with a packed prefix, and where each (layer, KV head)'s pages are in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvsculpt_vllm.kernels.paged_attention import Prefixes


class Packed(NamedTuple):
    """What `page_lists` needs to know of each row of a batch."""

    starts: Tensor  # (R, L, H)
    lengths: Tensor  # (R, L, H)
    span_blocks: Tensor  # (R,)


class Directory:
    """A table on the device of the packed prefixes that rows of a batch may begin with.

    It is indexed by the first block of a request's block list, so that a step needs no work of the host for each row.
    Whoever's list begins with a packed prefix's first block reads it: several requests may. The scheduler says when
    that block holds something else. The entry of block 0 stays empty, because padded rows point at the null block. A
    prefix takes a slot; slot 0 says "none".
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
        table.starts[slot], table.lengths[slot], table.span_blocks[slot] = starts, lengths, span_blocks

    def publish(self, request_id: str, first_block: int) -> None:
        """From now on, rows that begin with `first_block` read what was prepared."""
        self.forget(first_block)
        slot = self._published[first_block] = self._prepared.pop(request_id)
        self.prefixes.slot_of_block[first_block] = slot

    def release(self, request_id: str) -> None:
        """Forget what was prepared for a request and not published; unknown ones are fine."""
        if (slot := self._prepared.pop(request_id, None)) is not None:
            self._free_slots.append(slot)

    def forget(self, first_block: int) -> None:
        """The block holds something else now; one that no packed prefix begins with is fine."""
        if (slot := self._published.pop(first_block, None)) is not None:
            self.prefixes.slot_of_block[first_block] = 0
            self._free_slots.append(slot)

    def slots(self, first_blocks: Tensor) -> Tensor | None:
        """Each row's slot, 0 for rows without a packed prefix; None if no row has one.

        `first_blocks` (R,) is a block table's column 0.
        """
        if not self._published:
            return None
        slots = self.prefixes.slot_of_block[first_blocks.long()]
        return slots if slots.any() else None

    def entries(self, slots: Tensor) -> Packed:
        """The packed prefixes in `slots` (R,)."""
        table = self.prefixes
        return Packed(table.starts[slots], table.lengths[slots], table.span_blocks[slots])
