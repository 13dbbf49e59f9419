"""The directory against a dictionary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsculpt_vllm.engine.worker.directory import Directory

NUM_BLOCKS, NUM_SLOTS, SHAPE = 8, 4, (2, 2)
ROWS, WIDTH = 3, 6


def entry(number: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Starts and lengths that no other number has, and span blocks."""
    cells = torch.arange(4).view(SHAPE)
    return cells + 100 * number, cells + 100 * number + 50, number % 3 + 1


def publish(directory: Directory, request: str, block: int, number: int) -> None:
    directory.prepare(request, *entry(number))
    directory.publish(request, block)


TABLES = st.lists(
    st.tuples(st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=WIDTH, max_size=WIDTH), st.integers(1, WIDTH)),
    min_size=ROWS,
    max_size=ROWS,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, NUM_BLOCKS - 1), st.booleans()), max_size=40), TABLES)
def test_rows_begin_with_the_prefixes_published_last_and_not_forgotten(steps, table):
    directory, by_block = Directory(NUM_BLOCKS, NUM_SLOTS, *SHAPE, torch.device("cpu")), {}
    block_table = torch.tensor([row for row, _ in table], dtype=torch.int32)
    row_blocks = torch.tensor([blocks for _, blocks in table], dtype=torch.int32)
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
        wanted = [[entry(n) for n in walk(row, blocks, by_block)] for row, blocks in table]
        chains, longest = directory.chains(block_table, row_blocks), max(map(len, wanted))
        if longest == 0:
            assert chains is None
            continue
        assert chains.starts.shape == chains.lengths.shape == (ROWS, longest, *SHAPE)
        for r, chain in enumerate(wanted):
            for number in range(longest):
                got = chains.starts[r, number], chains.lengths[r, number], int(chains.span_blocks[r, number])
                starts, lengths, span_blocks = chain[number] if number < len(chain) else (*torch.zeros(2, *SHAPE), 0)
                assert torch.equal(got[0], starts.long()) and torch.equal(got[1], lengths.long())
                assert got[2] == span_blocks


def walk(row: list[int], blocks: int, by_block: dict[int, int]) -> list[int]:
    """Numbers of the prefixes that a row of so many blocks begins with."""
    column, numbers = 0, []
    while column < blocks and row[column] in by_block:
        numbers.append(by_block[row[column]])
        column += entry(numbers[-1])[2]
    return numbers


def test_a_batch_without_packed_rows_takes_the_stock_path():
    directory = Directory(NUM_BLOCKS, NUM_SLOTS, *SHAPE, torch.device("cpu"))
    blocks = torch.tensor([2, 2, 2])
    directory.prepare("a", *entry(0))
    assert directory.chains(torch.tensor([[1, 3], [5, 2], [0, 0]]), blocks) is None
    directory.publish("a", 5)
    assert directory.chains(torch.tensor([[1, 5], [0, 5], [4, 0]]), blocks) is None
    chains = directory.chains(torch.tensor([[1, 5], [5, 2], [0, 0]]), blocks)
    assert chains.span_blocks.tolist() == [[0], [1], [0]]
    assert chains.of(torch.tensor([1])).lengths.tolist() == [[entry(0)[1].tolist()]]


def test_what_a_row_does_not_have_is_no_segment():
    directory = Directory(NUM_BLOCKS, NUM_SLOTS, *SHAPE, torch.device("cpu"))
    publish(directory, "a", 5, 1)  # two columns
    publish(directory, "b", 6, 0)
    table = torch.tensor([[5, 0, 6, 3], [5, 0, 6, 5], [5, 0, 5, 0]], dtype=torch.int32)
    chains = directory.chains(table, torch.tensor([4, 2, 4]))  # the second row's last columns are an earlier one's
    assert chains.span_blocks.tolist() == [[2, 1], [2, 0], [2, 2]]


def test_there_are_as_many_slots_as_prefixes_at_once():
    directory = Directory(NUM_BLOCKS, NUM_SLOTS, *SHAPE, torch.device("cpu"))
    for number in range(NUM_SLOTS):
        publish(directory, str(number), number + 1, number)
    directory.forget(1)
    directory.prepare("0", *entry(7))
    directory.prepare("0", *entry(8))  # a second time: no slot more
    with pytest.raises(IndexError):
        directory.prepare("one too many", *entry(9))
