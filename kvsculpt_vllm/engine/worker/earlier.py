"""The entries of the segments before the one that is made, read out of their pages when they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvsculpt_vllm.engine.worker.state import CompressionState
from kvsculpt_vllm.sculpt.problem import Earlier
from kvsculpt_vllm.sculpt.transfer import on_device


def packed_entries(state: CompressionState, packed: list[list[int]]) -> Earlier:
    """What every (layer, KV head) has in a chain of segments, each given by its packed blocks.

    Nothing is read before it is asked for: of a long context all heads' entries together are most of its cache.
    """
    cells, starts, lengths = [], [], []
    for blocks in packed:
        cells.append(state.geometry.packed_pages(on_device(blocks, state.pages.buffer.device)))
        start, length = state.directory.places(blocks[0])
        starts.append(start)
        lengths.append(length)
    places = [
        torch.cat([own[starts[s][b] : starts[s][b] + lengths[s][b]] for s, own in enumerate(cells)])
        for b in range(state.geometry.num_cells)
    ]
    heads = _Heads(state, places)
    return Earlier(_Entries(heads, 0), _Entries(heads, 1))


class _Heads:
    """Reads keys and values of a head, which lie in the same pages, at once: whoever wants the ones wants the others
    next.
    """

    def __init__(self, state: CompressionState, places: list[Tensor]) -> None:
        self._state, self._places = state, places
        self._last, self._pair = -1, tuple[Tensor, ...]()

    def __len__(self) -> int:
        return len(self._places)

    def read(self, head: int) -> tuple[Tensor, ...]:
        if head != self._last:
            self._last, self._pair = head, self._state.pages.read(self._places[head])
        return self._pair


class _Entries(Sequence[Tensor]):
    """Keys (0) or values (1), (entries, D) of each head."""

    def __init__(self, heads: _Heads, which: int) -> None:
        self._heads, self._which = heads, which

    def __len__(self) -> int:
        return len(self._heads)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # nobody wants a run of them
        return self._heads.read(index)[self._which]
