"""Page copies: what they write and read is where vLLM's own view of the cache has it, bit by bit."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kvsculpt_vllm.engine.worker.selftest.notes import Notes
from kvsculpt_vllm.engine.worker.selftest.subject import Subject
from kvsculpt_vllm.kernels.pages import store


def check(subject: Subject, notes: Notes) -> None:
    """Store a step's entries, scatter pages and gather them: first and last block, layer and KV head."""
    generator = torch.Generator().manual_seed(1)
    for layer in subject.end_layers:
        for joined in (True, False):
            _stored(subject, notes, layer, joined, generator)
    _scattered(subject, notes, generator)
    _gathered(subject, notes, generator)
    if subject.cache_dtype != subject.dtype:
        _decoded(subject, notes, generator)
    subject.clear()


def _stored(subject: Subject, notes: Notes, layer: int, joined: bool, generator: torch.Generator) -> None:
    """Entries of some tokens of a step. `joined`: keys and values lie beside one another, as a projection leaves them,
    and one token is padding; else they are tensors of their own.
    """
    size, heads, head_size = subject.geometry.block_size, subject.geometry.num_heads, subject.head_size
    last = (subject.num_blocks - 1) * size
    # Where -1 could end up, the first slot of all and the last, must stay empty beside padding.
    slots = [1, -1, size - 1, last, last + size - 2] if joined else [0, last + size - 1]
    shape = len(slots) + 1, 2 * heads, head_size  # a token more than slots
    both = subject.normal(*shape, generator=generator, dtype=subject.cache_dtype)
    keys, values = both.split(heads, dim=1)
    if not joined:
        keys, values = keys.contiguous(), values.contiguous()
    subject.clear()
    wanted = subject.content()
    for token, slot in enumerate(slots):
        if slot >= 0:
            entry = wanted[layer, subject.corners.index(slot // size), :, slot % size]
            entry[:, :head_size], entry[:, head_size:] = keys[token], values[token]
    index = torch.tensor(slots, device=subject.device)

    def call() -> tuple[Tensor]:
        store(subject.pages.kernel_pages, layer, index, keys, values)
        return (subject.content(),)

    case = f"layer {layer}, slots {slots}"
    (found,) = notes.twice("store", case, call)
    notes.same("store", case, found, wanted)


def _scattered(subject: Subject, notes: Notes, generator: torch.Generator) -> None:
    """Whole pages, as a segment is written."""
    size, head_size = subject.geometry.block_size, subject.head_size
    index, cells = _corners(subject)
    # A head's pages may begin anywhere in the list of a segment's: addresses that are aligned, and such as are not.
    for first in (0, 1):
        some = index[first:]
        shape = len(some) * size, head_size
        keys, values = (subject.normal(*shape, generator=generator, dtype=subject.cache_dtype) for _ in range(2))
        subject.clear()
        wanted = subject.content()
        for number, (layer, head, block) in enumerate(cells[first:]):
            page = wanted[layer, block, head]
            own = slice(number * size, (number + 1) * size)
            page[:, :head_size], page[:, head_size:] = keys[own], values[own]

        def call(some: Tensor = some, keys: Tensor = keys, values: Tensor = values) -> tuple[Tensor]:
            subject.pages.write_numbers(some, keys, values)
            return (subject.content(),)

        case = f"pages {some.tolist()}"
        (found,) = notes.twice("scatter", case, call)
        notes.same("scatter", case, found, wanted)


def _gathered(subject: Subject, notes: Notes, generator: torch.Generator) -> None:
    """Whole pages, as a segment is read."""
    subject.fill(generator, null_block=True)
    content = subject.content()
    index, cells = _corners(subject)
    for first in (0, 1):
        some = index[first:]
        wanted = torch.cat([content[layer, block, head] for layer, head, block in cells[first:]])
        case = f"pages {some.tolist()}"
        found = notes.twice("gather", case, partial(subject.pages.numbers, some))
        notes.same("gather", case, torch.cat(found, dim=1), wanted)


def _decoded(subject: Subject, notes: Notes, generator: torch.Generator) -> None:
    """Entries of FP8 that are read, and written as they were read, are what they were."""
    subject.fill(generator, null_block=True)
    index, _ = _corners(subject)
    for before, after in zip(subject.pages.numbers(index), _written_as_read(subject, index), strict=True):
        notes.same("FP8, written as it was read", f"pages {index.tolist()}", after.float(), before.float())


def _written_as_read(subject: Subject, index: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = subject.pages.read(index)
    subject.clear()
    subject.pages.write(index, keys, values)
    return subject.pages.numbers(index)


def _corners(subject: Subject) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """The pages of first and last layer, head and block: their numbers, and where each is in `Subject.content` as
    (layer, head, place of the block).
    """
    of_block = subject.geometry.block_pages(torch.tensor(subject.corners, device=subject.device))  # (L, H, corners)
    places = [sorted({0, count - 1}) for count in of_block.shape]
    cells = [(layer, head, block) for layer in places[0] for head in places[1] for block in places[2]]
    return torch.stack([of_block[cell] for cell in cells]), cells
