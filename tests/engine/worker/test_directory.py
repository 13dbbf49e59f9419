"""The directory against a dictionary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsculpt_vllm.engine.worker.directory import Directory

NUM_BLOCKS, NUM_SLOTS, SHAPE = 12, 3, (2, 2)


def entry(number: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Starts, lengths and span blocks that no other number has."""
    cells = torch.arange(4).view(SHAPE)
    return cells + 100 * number, cells + 100 * number + 50, number + 1


def publish(directory: Directory, request: str, block: int, number: int) -> None:
    directory.prepare(request, *entry(number))
    directory.publish(request, block)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, NUM_BLOCKS - 1), st.booleans()), max_size=40))
def test_every_block_leads_to_the_prefix_published_last_and_not_forgotten(steps):
    directory, by_block = Directory(NUM_BLOCKS, NUM_SLOTS, *SHAPE, torch.device("cpu")), {}
    for number, (block, abandoned) in enumerate(steps):
        # Block 0 (null), one that holds a prefix already, and too many at once: the prefix is forgotten instead.
        if block == 0 or block in by_block or len(by_block) == NUM_SLOTS:
            directory.forget(block)
            by_block.pop(block, None)
        elif abandoned:  # prepared, and its request went away
            directory.prepare("r", *entry(number))
            directory.release("r")
        else:
            publish(directory, "r", block, number)
            by_block[block] = number
        assert len(directory) == len(by_block)
        assert [b for b in range(NUM_BLOCKS) if b in directory] == sorted(by_block)
        blocks = torch.tensor([0, *reversed(range(NUM_BLOCKS)), 0], dtype=torch.int32)
        slots = directory.slots(blocks)
        if not by_block:
            assert slots is None
            continue
        packed = directory.entries(slots)
        for row, block in enumerate(blocks.tolist()):
            assert (slots[row] > 0) == (block in by_block)
            if block in by_block:
                starts, lengths, span_blocks = entry(by_block[block])
                assert torch.equal(packed.starts[row], starts)
                assert torch.equal(packed.lengths[row], lengths)
                assert packed.span_blocks[row] == span_blocks


def test_a_batch_without_packed_rows_takes_the_stock_path():
    directory = Directory(NUM_BLOCKS, NUM_SLOTS, *SHAPE, torch.device("cpu"))
    directory.prepare("a", *entry(0))
    assert directory.slots(torch.tensor([1, 5, 0])) is None
    directory.publish("a", 5)
    assert directory.slots(torch.tensor([1, 0, 4])) is None
    assert directory.slots(torch.tensor([1, 5, 0])).bool().tolist() == [False, True, False]


def test_there_are_as_many_slots_as_prefixes_at_once():
    directory = Directory(NUM_BLOCKS, NUM_SLOTS, *SHAPE, torch.device("cpu"))
    for number in range(NUM_SLOTS):
        publish(directory, str(number), number + 1, number)
    directory.forget(1)
    directory.prepare("0", *entry(7))
    directory.prepare("0", *entry(8))  # a second time: no slot more
    with pytest.raises(IndexError):
        directory.prepare("one too many", *entry(9))
