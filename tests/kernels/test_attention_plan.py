"""The plan of a step's attention, made on the device: against one that is counted on the host, from poisoned memory."""

import pytest
import torch

from kvsculpt_vllm.kernels.attention_plan import TILE, BatchRows, Prefixes, plan_attention, prefill_tile, prefill_tiles
from kvsculpt_vllm.kernels.pages import Pages

LAYERS, BLOCK = 2, 16


@pytest.fixture(autouse=True)
def poisoned(poison_empty_memory):
    """What is not written must not be read."""


def make(heads, rows, device, seed=0):
    """`rows`: (new tokens, tokens in all, span blocks of each segment); every segment's heads have other budgets.

    Returns what `plan_attention` takes, and the entries (R, L, heads) that a row with one token has to read.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(1, *(-(-tokens // BLOCK) for _, tokens, _ in rows))
    slots = 1 + sum(len(spans) for _, _, spans in rows)
    slot_of_block, span_blocks = torch.zeros(slots + 1, dtype=torch.int64), torch.zeros(slots, dtype=torch.int64)
    starts, lengths = (torch.zeros(slots, LAYERS, heads, dtype=torch.int64) for _ in range(2))
    table = torch.full((len(rows), width), slots, dtype=torch.int32)  # a block that begins nothing
    entries, chains, slot = torch.zeros(len(rows), LAYERS, heads, dtype=torch.int64), [], 0
    for r, (new, tokens, spans) in enumerate(rows):
        column, chain = 0, []
        for span in spans:
            slot += 1
            chain.append(slot)
            table[r, column], slot_of_block[slot], span_blocks[slot] = slot, slot, span
            lengths[slot] = torch.randint(1, span + 1, (LAYERS, heads), generator=generator)
            entries[r] += lengths[slot] * BLOCK
            column += span
        entries[r] = entries[r] + tokens - column * BLOCK if new == 1 else 0
        chains.append(chain)
    begins = torch.tensor([0, *(new for new, _, _ in rows)]).cumsum(0)
    lens = torch.tensor([tokens for _, tokens, _ in rows])
    batch = BatchRows(*(t.int().to(device) for t in (table, begins, lens)), None, True, int(begins[-1]))
    prefixes = Prefixes(*(t.to(device) for t in (slot_of_block, starts, lengths, span_blocks)))
    cells = LAYERS * heads
    pages = Pages(torch.zeros(1, 1).to(device), torch.arange(cells).to(device), cells, BLOCK, 32, 16)
    return (pages, prefixes, batch), entries, chains


UNEVEN = [(1, 2000, (60, 50)), (1, 5, ()), (0, 0, ()), (7, 900, (20,)), (1, 333, (4, 4, 4)), (1, 1, ())]
MANY = [(1, 1 + 37 * number % 250, (1,) * (number % 3 and number % 5 == 0)) for number in range(300)]


@pytest.mark.parametrize(("heads", "rows", "most"), [(3, UNEVEN, 1), (3, UNEVEN, 7), (3, UNEVEN, 528), (2, MANY, 30)])
def test_every_entry_has_one_program_and_every_program_has_entries(heads, rows, most, device):
    arguments, entries, chains = make(heads, rows, device)
    plan = plan_attention(*arguments, most)
    for r, chain in enumerate(chains):
        assert plan.chains[r, : int(plan.segments[r])].tolist() == chain
    for layer in range(LAYERS):
        count, chunk, merges = plan.counts[layer].tolist()
        own = entries[:, layer].flatten()
        assert chunk == max(1, -(-int(own.sum()) // (most * TILE))) * TILE
        wanted = [(pair, number) for pair, n in enumerate(own.tolist()) for number in range(-(-n // chunk))]
        items = plan.items[layer, :count].cpu()
        assert [tuple(item) for item in items[:, :2].tolist()] == wanted
        assert len(wanted) <= plan.items.shape[1]
        # Pairs of more than one chunk write parts, each its own, which are merged in their order.
        parts = items[items[:, 2] >= 0]
        assert parts[:, 2].tolist() == list(range(len(parts))) and len(parts) <= 2 * most
        split = [(pair, -(-n // chunk)) for pair, n in enumerate(own.tolist()) if n > chunk]
        assert [(pair, number) for pair, _, number in plan.merges[layer, :merges, :3].tolist()] == split
        for pair, first, number in plan.merges[layer, :merges, :3].tolist():
            assert parts[parts[:, 0] == pair, 2].tolist() == list(range(first, first + number))


def test_few_rows_with_uneven_budgets_fill_the_processors(device):
    """One row, one of whose heads has eight times the entries of the others: none of 40 programs has that many."""
    arguments, _, _ = make(4, [(1, 9000, (550,))], device)
    arguments[1].lengths[1] = torch.tensor([50, 50, 50, 550])
    plan = plan_attention(*arguments, 40)
    entries = [50 * BLOCK + 200] * 3 + [550 * BLOCK + 200]
    count, chunk, _ = plan.counts[0].tolist()
    assert chunk <= sum(entries) / 40 + TILE < max(entries) / 20
    assert 35 <= count <= 44


def test_prefill_tiles_cover_rows_with_several_tokens_once():
    begins = torch.tensor([0, 5, 6, 6, 40, 42, 42])
    for group in (1, 3, 64, 100):
        size, covered = prefill_tile(group), []
        for row, first in prefill_tiles(begins, group).tolist():
            assert begins[row] <= first < begins[row + 1]
            covered += range(first, min(first + size, int(begins[row + 1])))
        assert sorted(covered) == [*range(5), *range(6, 42)]
    assert len(prefill_tiles(torch.arange(4), 4)) == 0
