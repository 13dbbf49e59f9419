"""Page arithmetic against real views of one buffer, and page content against what vLLM's own kernel writes."""

from dataclasses import dataclass
from itertools import count

import pytest
import torch
import vllm._custom_ops as ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvsculpt_vllm.engine.worker.directory import Chains
from kvsculpt_vllm.engine.worker.pages import PageGeometry, TokenPages, VectorPages, page_lists, place

LAYOUTS = ["BLHNC", "LBHNC", "BLHNC, padded blocks"]


def layer_views(
    layout: str, blocks: int, layers: int, heads: int, size: int, width: int, dtype: torch.dtype
) -> list[Tensor]:
    """Views (blocks, heads, size, width) of one byte buffer, the last layer first, with a page to spare at its end."""
    cells, page = layers * heads + 2 * ("padded" in layout), size * width
    raw = torch.zeros((blocks * cells + 1) * page * dtype.itemsize, dtype=torch.int8).view(dtype)
    if layout == "LBHNC":
        whole = raw[: blocks * cells * page].view(layers, blocks, heads, size, width)
        return list(whole)[::-1]
    whole = raw[: blocks * cells * page].view(blocks, cells, size, width)[:, : layers * heads]
    return list(whole.unflatten(1, (layers, heads)).unbind(1))[::-1]


@dataclass
class Row:
    """One request of a batch, which begins with any number of segments."""

    blocks: list[int]  # its block table
    seq_len: int
    segments: list[tuple[int, list[int]]]  # blocks that it stands for, pages of each (layer, head)


@st.composite
def batches(draw):
    """Layout, sizes and rows; no block belongs to two rows, and null blocks (0) fill up a segment's span."""
    layers, heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))
    cells, rows, used = layers * heads, [], count(1)
    for num_segments in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)):
        table, segments = [], []
        for _ in range(num_segments):
            packed, nulls = draw(st.integers(1, 3)), draw(st.integers(0, 3))
            # Every head gets a page; where the others go is drawn.
            others = draw(
                st.lists(st.integers(0, cells - 1), min_size=(packed - 1) * cells, max_size=(packed - 1) * cells)
            )
            table += [next(used) for _ in range(packed)] + [0] * nulls
            segments.append((packed + nulls, [1 + others.count(c) for c in range(cells)]))
        tail_tokens = draw(st.integers(1, 3 * size))
        seq_len = len(table) * size + tail_tokens
        table += [next(used) for _ in range(-(-tail_tokens // size))]
        rows.append(Row(table, seq_len, segments))
    num_blocks = next(used)
    ids = [0, *draw(st.permutations(range(1, num_blocks)))]
    for row in rows:
        row.blocks = [ids[block] for block in row.blocks]
    return draw(st.sampled_from(LAYOUTS)), layers, heads, size, num_blocks, rows


@settings(max_examples=100, deadline=None)
@given(batches())
def test_page_lists_name_the_pages_of_every_entry_and_no_others(batch):
    layout, layers, heads, size, num_blocks, rows = batch
    views = layer_views(layout, num_blocks, layers, heads, size, 4, torch.int64)
    geometry, buffer = PageGeometry.of(views)
    cells = layers * heads
    # Write a tag into the page of every entry, where docs/architecture.md#the-way-of-a-request says that it is.
    tags, expected = count(1), {}
    longest = max(len(row.segments) for row in rows)
    starts, lengths = torch.zeros(2, len(rows), longest, layers, heads, dtype=torch.int64)
    spans = torch.zeros(len(rows), longest, dtype=torch.int64)
    for r, row in enumerate(rows):
        for cell in range(cells):
            layer, head = divmod(cell, heads)
            found, column, packed_entries = [], 0, 0
            for i, (span, budgets) in enumerate(row.segments):
                starts[r, i, layer, head], lengths[r, i, layer, head] = sum(budgets[:cell]), budgets[cell]
                spans[r, i] = span
                for number in range(sum(budgets[:cell]), sum(budgets[: cell + 1])):
                    other_layer, other_head = divmod(number % cells, heads)
                    views[other_layer][row.blocks[column + number // cells], other_head] = tag = next(tags)
                    found.append(tag)
                column += span
                packed_entries += budgets[cell] * size
            for block in row.blocks[column:]:
                views[layer][block, head] = tag = next(tags)
                found.append(tag)
            expected[layer, head, r] = found, packed_entries + row.seq_len - column * size

    width = max(len(row.blocks) for row in rows) + 1
    pages, counts = page_lists(
        geometry,
        torch.tensor([row.blocks + [num_blocks - 1] * (width - len(row.blocks)) for row in rows], dtype=torch.int32),
        torch.tensor([row.seq_len for row in rows], dtype=torch.int32),
        Chains(starts, lengths, spans),
    )
    assert pages.dtype == counts.dtype == torch.int32
    assert pages.shape[-1] == max(len(tagged) for tagged, _ in expected.values())
    for (layer, head, r), (tagged, entries) in expected.items():
        listed = pages[layer, head, r].tolist()
        # A page that two entries share would carry the later one's tag only.
        assert buffer[listed[: len(tagged)]].unique(dim=1).flatten().tolist() == tagged
        assert not any(listed[len(tagged) :])
        assert counts[layer, head, r] == entries


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("layers", "heads"), [(3, 2), (2, 1), (1, 3)])
def test_geometry_finds_every_cell_of_the_buffer(layout, layers, heads):
    views = layer_views(layout, 5, layers, heads, 4, 6, torch.int64)
    geometry, buffer = PageGeometry.of(views)
    assert (geometry.num_cells, geometry.block_size, buffer.shape[1]) == (layers * heads, 4, 24)
    number = count(1)
    for layer in range(layers):
        for block in range(5):
            for head in range(heads):
                views[layer][block, head] = next(number)
    blocks = torch.tensor([4, 0, 3])
    pages, packed = geometry.block_pages(blocks), geometry.packed_pages(blocks).tolist()
    assert len(packed) == len(set(packed)) == 3 * layers * heads
    for layer in range(layers):
        for head in range(heads):
            for i, block in enumerate(blocks):
                page = pages[layer, head, i]
                assert torch.equal(buffer[page], views[layer][block, head].flatten())
                assert packed[i * layers * heads + layer * heads + head] == page


def test_budgets_lie_one_after_the_other():
    assert place([3, 1, 2]) == [0, 3, 4]
    assert place([5]) == [0]


def tokens_before_heads():
    return list(torch.zeros(2, 5, 4, 2, 6).transpose(2, 3))


def one_buffer_a_layer():
    return [torch.zeros(5, 2, 4, 6) for _ in range(2)]


def keys_and_values_apart():
    return [view[..., :3] for view in torch.zeros(2, 5, 2, 4, 6)]


def pages_off_their_grid():
    return list(torch.zeros(2 * 5 * 2 * 24 + 8)[8:].view(2, 5, 2, 4, 6))


@pytest.mark.parametrize(
    "views", [tokens_before_heads, one_buffer_a_layer, keys_and_values_apart, pages_off_their_grid]
)
def test_other_layouts_are_refused_with_the_cure(views):
    with pytest.raises(ValueError, match=r"not one buffer of contiguous .* use the layout LBHNC or BLHNC"):
        PageGeometry.of(views())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("isa", "head_size", "dtype"),
    [
        ("vec", 64, torch.bfloat16),
        ("vec", 32, torch.float32),
        ("vec16", 48, torch.bfloat16),
        ("vec16", 80, torch.float16),
    ],
)
def test_pages_hold_what_the_stock_kernel_wrote(layout, isa, head_size, dtype):
    size, heads, blocks = 32, 2, torch.tensor([3, 1])
    views = layer_views(layout, 5, 3, heads, size, 2 * head_size, dtype)
    geometry, buffer = PageGeometry.of(views)
    buffer.fill_(3e4)
    written = []
    num_tokens = 2 * size - 7
    slots = (blocks[:, None] * size + torch.arange(size)).flatten()[:num_tokens]
    for view in views:
        key, value = torch.randn(2, num_tokens, heads, head_size).to(dtype)
        caches = view.view(5, heads, 2 * size, head_size).chunk(2, dim=2)  # as CPUAttentionBackendImpl does
        order = torch.randperm(num_tokens)
        ops.cpu_attn_reshape_and_cache(key[order], value[order], *caches, slots[order], isa)
        written.append((key.transpose(0, 1), value.transpose(0, 1)))
    keys, values = VectorPages(buffer, geometry).read(geometry.block_pages(blocks))
    for layer, (key, value) in enumerate(written):
        assert torch.equal(keys[layer, :, :num_tokens], key)
        assert torch.equal(values[layer, :, :num_tokens], value)
    assert (keys[:, :, num_tokens:] == buffer.new_tensor(3e4)).all()
    untouched = torch.ones(len(buffer), dtype=torch.bool)
    untouched[geometry.block_pages(blocks).flatten()] = False
    assert (buffer[untouched] == buffer.new_tensor(3e4)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_pages_hold_each_tokens_key_and_then_its_value(layout):
    """As vLLM's GPU backends see a layer's view: (blocks, heads, N, K|V)."""
    size, heads, head_size, blocks = 16, 2, 8, torch.tensor([3, 1])
    views = layer_views(layout, 5, 3, heads, size, 2 * head_size, torch.bfloat16)
    geometry, buffer = PageGeometry.of(views)
    for view in views:
        view.copy_(torch.randn(view.shape))
    keys, values = TokenPages(buffer, geometry).read(geometry.block_pages(blocks))
    for layer, view in enumerate(views):
        wanted = view[blocks].transpose(0, 1).flatten(1, 2)  # (heads, 2 · size, K|V)
        assert torch.equal(keys[layer], wanted[..., :head_size])
        assert torch.equal(values[layer], wanted[..., head_size:])


@pytest.mark.parametrize("page_format", [VectorPages, TokenPages])
def test_written_pages_are_read_back_and_others_are_not_touched(page_format):
    geometry, buffer = PageGeometry.of(layer_views("LBHNC", 3, 3, 1, 4, 2 * 3, torch.float32))
    buffer.fill_(3e4)
    pages, at = page_format(buffer, geometry), torch.tensor([7, 2, 3])
    assert pages.head_size == 3
    keys, values = torch.randn(2, 12, 3)
    pages.write(at, keys, values)
    read = pages.read(at[None, None])
    assert torch.equal(read[0][0, 0], keys) and torch.equal(read[1][0, 0], values)
    assert torch.equal(pages.read(at[1:2])[0], keys[4:8])
    assert (buffer[[0, 1, 4, 5, 6, 8]] == 3e4).all()
