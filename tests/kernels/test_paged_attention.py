"""Attention over chains of packed prefixes: against the twin, in a buffer poisoned wherever no entry was written."""

import pytest
import torch

from kvsculpt_vllm.kernels.attention_plan import BatchRows, Prefixes, plan_attention, prefill_tile, prefill_tiles
from kvsculpt_vllm.kernels.paged_attention import paged_attention, paged_attention_twin
from kvsculpt_vllm.kernels.pages import FP8, Pages

LAYERS, BLOCK = 2, 16
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def poisoned(poison_empty_memory):
    """What is not written must not be read."""


def make_case(rows, kv_heads, group, head_size, dtype, device, layout="LBHNC", seed=0):
    """`rows`: (new tokens, tokens in all, span blocks of each segment). Every head of a segment has pages of its own.

    Returns what `paged_attention` takes, and the entries of each (row, cell): positions, -1 if packed, and content.
    """
    generator = torch.Generator().manual_seed(seed)
    cells, num_blocks = LAYERS * kv_heads, 2 + sum(-(-tokens // BLOCK) for _, tokens, _ in rows)
    cell = torch.arange(cells)
    stride, cell_pages = (
        (cells, cell) if layout == "BLHNC" else (kv_heads, cell // kv_heads * num_blocks * kv_heads + cell % kv_heads)
    )
    buffer = torch.full((num_blocks * cells, BLOCK * 2 * head_size), torch.nan)
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()  # block 0 is the null block
    width = max(-(-tokens // BLOCK) for _, tokens, _ in rows) + 2
    table = torch.zeros(len(rows), width, dtype=torch.int32)
    num_slots = 1 + sum(len(spans) for _, _, spans in rows)
    slots = torch.zeros(num_blocks, dtype=torch.int64)
    starts, lengths = (torch.zeros(num_slots, LAYERS, kv_heads, dtype=torch.int64) for _ in range(2))
    span_blocks = torch.zeros(num_slots, dtype=torch.int64)
    unused_slots = (torch.randperm(num_slots - 1, generator=generator) + 1).tolist()
    written = {}

    def fill(r, own_cell, block, at_cell, positions):
        content = torch.randn(len(positions), 2 * head_size, generator=generator)
        buffer[int(block) * stride + int(cell_pages[at_cell])].view(BLOCK, -1)[: len(positions)] = content
        written.setdefault((r, own_cell), []).extend(zip(positions, content, strict=True))

    for r, (_, tokens, spans) in enumerate(rows):
        column = 0
        for span in spans:
            budgets = torch.randint(1, span + 1, (cells,), generator=generator)
            owners = torch.arange(cells).repeat_interleave(budgets)
            for i in range(0, len(owners), cells):
                table[r, column + i // cells] = free.pop()
            slot = slots[table[r, column]] = unused_slots.pop()
            span_blocks[slot], lengths[slot] = span, budgets.view(LAYERS, kv_heads)
            starts[slot] = (budgets.cumsum(0) - budgets).view(LAYERS, kv_heads)
            for number, owner in enumerate(owners.tolist()):
                fill(r, owner, table[r, column + number // cells], number % cells, [-1] * BLOCK)
            column += span
        for column in range(sum(spans), -(-tokens // BLOCK)):
            table[r, column] = free.pop()
            for own_cell in range(cells):
                positions = range(column * BLOCK, min(tokens, (column + 1) * BLOCK))
                fill(r, own_cell, table[r, column], own_cell, positions)
    for r, (_, tokens, _) in enumerate(rows):  # stale columns: as if a segment began there
        table[r, -(-tokens // BLOCK) :] = int(slots.argmax())
    starts_of_rows = torch.tensor([0, *torch.tensor([new for new, _, _ in rows]).cumsum(0).tolist()], dtype=torch.int32)
    query = torch.randn(int(starts_of_rows[-1]), kv_heads * group, head_size, generator=generator)
    pages = Pages(buffer.to(dtype).to(device), cell_pages.to(device), stride, BLOCK, 2 * head_size, head_size)
    prefixes = Prefixes(*(tensor.to(device) for tensor in (slots, starts, lengths, span_blocks)))
    lens = torch.tensor([tokens for _, tokens, _ in rows], dtype=torch.int32)
    counts = [new for new, _, _ in rows]
    tiles = prefill_tiles(starts_of_rows, group).to(device) if max(counts) > 1 else None
    tensors = [tensor.to(device) for tensor in (table, starts_of_rows, lens)]
    batch = BatchRows(*tensors, tiles, 1 in counts, sum(counts))
    return (query.to(dtype).to(device), pages, prefixes, batch), written


def check(query, pages, prefixes, rows, kv_heads, most=1, **logits):
    head_size, tensors = query.shape[-1], rows[:3]
    plan = plan_attention(pages, prefixes, rows, most)
    for layer in range(LAYERS):
        wanted = paged_attention_twin(query, pages, prefixes, *tensors, layer, kv_heads, head_size**-0.5, **logits)
        around = torch.full((len(query) + 2, *query.shape[1:]), torch.nan, dtype=query.dtype, device=query.device)
        out = around[1:-1]
        arguments = query, out, pages, prefixes, rows, plan, layer, kv_heads, head_size**-0.5
        paged_attention(*arguments, **logits)
        torch.testing.assert_close(out, wanted, rtol=0, atol=TOLERANCE[query.dtype])
        assert around[0].isnan().all() and around[-1].isnan().all()  # nothing written beside
        before = out.clone()
        paged_attention(*arguments, **logits)
        assert torch.equal(out, before)


DECODE = [(1, 70, (3,)), (1, 33, ()), (1, 1, ()), (1, 49, (1, 2)), (1, 193, (5, 1, 4, 2)), (1, 111, (2, 3, 1))]
MIXED = [(5, 63, (2,)), (1, 40, ()), (23, 23, ()), (9, 175, (4, 1, 3, 2)), (1, 65, (1, 3))]
LONG = [(1, 700, (12, 9)), (1, 1, ()), (1, 36 * BLOCK + 5, (1,) * 36)]
"""Rows that are cut into chunks: in a segment, in the tail, and behind more segments than are looked at at once."""


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
def test_chains_of_no_segment_one_and_more(rows, layout, device):
    case, _ = make_case(rows, 2, 3, 64, torch.float32, device, layout)
    check(*case, 2)


@pytest.mark.parametrize("most", [3, 100])
def test_long_rows_are_shared_among_programs(most, device):
    case, _ = make_case(LONG, 1, 2, 16, torch.float32, device)
    check(*case, 1, most)


def test_a_prefill_reads_nothing_that_none_of_its_tokens_sees(device):
    """Values that are not a number would spoil the answers of tokens that are to give them no weight."""
    new, tokens, size = 30, 100, prefill_tile(4)
    (query, pages, prefixes, rows), _ = make_case([(new, tokens, (3,))], 1, 4, 32, torch.float32, device)
    plan, answers = plan_attention(pages, prefixes, rows, 1), []
    for unseen in (tokens, tokens - new + size):  # from this position on: none, and those of all tiles but the first
        for position in range(unseen, tokens):
            page = int(rows.block_table[0, position // BLOCK]) * pages.block_stride + int(pages.cell_pages[0])
            pages.buffer[page].view(BLOCK, -1)[position % BLOCK] = torch.nan
        out = torch.empty_like(query)
        paged_attention(query, out, pages, prefixes, rows, plan, 0, 1, 1.0)
        answers.append(out)
    assert torch.equal(*(answer[:size] for answer in answers))
    assert answers[1][size:].isnan().all()


def test_padding_gives_zeros_and_is_not_read(device):
    """As in a recorded graph: rows and tokens that nobody asked for, beside some that end in the middle."""
    (query, pages, prefixes, rows), _ = make_case(DECODE, 2, 3, 64, torch.float32, device)
    more, padded = 3, query.new_full((len(query) + 3, *query.shape[1:]), torch.nan)
    padded[: len(query)] = query
    for rows_of_padding in (more, 0):  # in an eager batch tokens are padded, and no row is
        table, begins, lens = (
            torch.cat([tensor, tensor[:1].expand(rows_of_padding, *tensor.shape[1:]) * 0]) for tensor in rows[:3]
        )
        begins[len(DECODE) + 1 :] = len(query)
        for decode in (True, False):
            given = rows._replace(block_table=table, query_start_loc=begins, seq_lens=lens, decode=decode)
            out = torch.full_like(padded, torch.nan)
            paged_attention(padded, out, pages, prefixes, given, plan_attention(pages, prefixes, given, 2), 1, 2, 1.0)
            assert (out[len(query) :] == 0).all()
            assert out[: len(query)].isfinite().all() == decode


SINKS = torch.tensor([-1.0, 0.5, 3.0, 8.0])


@pytest.mark.parametrize(("sinks", "soft_cap"), [(None, 1.5), (SINKS, 0.0), (SINKS, 1.5)])
def test_sinks_and_a_soft_cap(sinks, soft_cap, device):
    """In rows of several chunks a sink counts once."""
    case, _ = make_case([(1, 150, (3, 2)), (1, 1, ()), (20, 60, (2,))], 2, 2, 16, torch.float32, device)
    case[0].mul_(3)  # such that a cap is felt
    check(*case, 2, 100, sink_logits=None if sinks is None else sinks.to(device), soft_cap=soft_cap)


@pytest.mark.parametrize(("rows", "sinks", "soft_cap"), [(DECODE, None, 0.0), (MIXED, None, 0.0), (MIXED, SINKS, 2.0)])
def test_the_twin_attends_to_what_was_written_for_each_head(rows, sinks, soft_cap, device):
    heads, group, head_size = 2, 2, 16
    (query, pages, prefixes, asked_rows), written = make_case(rows, heads, group, head_size, torch.float32, device)
    counts = [new for new, _, _ in rows]
    on_device = None if sinks is None else sinks.to(device)
    asked = query.cpu().split(counts)
    for layer in range(LAYERS):
        answers = (
            paged_attention_twin(query, pages, prefixes, *asked_rows[:3], layer, heads, 1.0, on_device, soft_cap)
            .cpu()
            .split(counts)
        )
        for r, (new, tokens, _) in enumerate(rows):
            for head in range(heads * group):
                entries = written[r, layer * heads + head // group]
                positions, content = torch.tensor([at for at, _ in entries]), torch.stack([row for _, row in entries])
                logits = asked[r][:, head] @ content[:, :head_size].T
                if soft_cap:
                    logits = soft_cap * (logits / soft_cap).tanh()
                weights = logits.exp() * (positions <= torch.arange(tokens - new, tokens)[:, None])
                mass = weights.sum(-1, keepdim=True) + (0.0 if sinks is None else float(sinks[head].exp()))
                wanted = weights / mass @ content[:, head_size:]
                torch.testing.assert_close(answers[r][:, head], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group", "head_size"), [(1, 128), (6, 96), (8, 64), (2, 256)])
def test_groups_head_sizes_and_dtypes(group, head_size, dtype, device):
    rows = [(1, 70, (1, 2)), (4, 33, ())]
    case, _ = make_case(rows, 1, group, head_size, dtype, device)
    check(*case, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("group", "head_size"), [(6, 128), (3, 96)])
def test_a_cache_in_fp8_is_read_as_the_numbers_that_it_holds(group, head_size, dtype, device):
    (query, pages, prefixes, rows), _ = make_case([(1, 70, (1, 2)), (4, 33, ())], 2, group, head_size, dtype, device)
    in_fp8 = pages._replace(buffer=pages.buffer.to(FP8))
    assert not in_fp8.buffer.float().nan_to_num().equal(pages.buffer.float().nan_to_num())
    check(query, in_fp8, prefixes, rows, 2)  # the twin reads it in float64
    with pytest.raises(ValueError, match="out: dtype"):
        plan = plan_attention(in_fp8, prefixes, rows, 1)
        paged_attention(query, query.double(), in_fp8, prefixes, rows, plan, 0, 2, 1.0)
    with pytest.raises(ValueError, match=r"query: dtype torch\.float64 given"):
        paged_attention(query.double(), query, in_fp8, prefixes, rows, plan, 0, 2, 1.0)


def test_what_does_not_fit_is_named(device):
    (query, pages, prefixes, rows), _ = make_case(DECODE, 2, 3, 64, torch.float32, device)
    plan = plan_attention(pages, prefixes, rows, 1)

    def attend(query=query, pages=pages, kv_heads=2, **logits):
        paged_attention(query, torch.empty_like(query), pages, prefixes, rows, plan, 0, kv_heads, 1.0, **logits)

    with pytest.raises(ValueError, match=r"query: dtype torch\.float32 given"):
        attend(pages=pages._replace(buffer=pages.buffer.half()))
    with pytest.raises(ValueError, match="num_kv_heads: 4 given, 6 query heads"):
        attend(kv_heads=4)
    with pytest.raises(ValueError, match="query: strides"):
        attend(query=query.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match=r"sink_logits: shape \(5,\) given"):
        attend(sink_logits=torch.zeros(5, device=device))
    with pytest.raises(ValueError, match=r"soft_cap: -1\.0 given"):
        attend(soft_cap=-1.0)
    with pytest.raises(ValueError, match=r"seq_lens: dtype torch\.int64 given"):
        plan_attention(pages, prefixes, rows._replace(seq_lens=rows.seq_lens.long()), 1)
    with pytest.raises(ValueError, match="lengths: must be contiguous"):
        plan_attention(pages, prefixes._replace(lengths=prefixes.lengths.transpose(1, 2)), rows, 1)
    with pytest.raises(ValueError, match="most: 0 given"):
        plan_attention(pages, prefixes, rows, 0)
