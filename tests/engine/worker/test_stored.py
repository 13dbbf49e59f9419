"""Segments between their pages and the store, as one rank's worker moves them: in slices, and all of one or nothing."""

import random
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.commands import LoadCommand
from kvsculpt_vllm.engine.shared.stores import PATIENCE_SECONDS
from kvsculpt_vllm.engine.worker import stored as module
from kvsculpt_vllm.engine.worker.pages import TokenPages, VectorPages
from kvsculpt_vllm.engine.worker.state import CompressionState
from kvsculpt_vllm.engine.worker.stored import AHEAD, ReadOutcome, StoredSegments
from kvsculpt_vllm.store.background import BackgroundStore, StoreAway
from kvsculpt_vllm.store.file import StoredSegment
from kvsculpt_vllm.store.store import Store
from kvsculpt_vllm.store.unusable import Reason, Unusable
from stored import name

LAYERS, HEADS, SIZE, WIDTH, BLOCKS = 3, 2, 4, 8, 24
CELLS = LAYERS * HEADS
TOKENS = 8 * SIZE  # that a segment stands for
WAIT = 30  # seconds; a test that waits so long has failed
UNTOUCHED = 77.0


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def make_state(page_format=VectorPages, layout="LBHNC", dtype=torch.bfloat16):
    shape = (LAYERS, BLOCKS) if layout == "LBHNC" else (BLOCKS, LAYERS)
    raw = torch.full((*shape, HEADS, SIZE, 2 * WIDTH), UNTOUCHED, dtype=dtype)
    views = list(raw) if layout == "LBHNC" else list(raw.unbind(1))
    config = CompressionConfig(method="sculpt")
    return CompressionState(config, None, page_format, views, 4, max_num_seqs=1, dtype=dtype)


def segment(label, pages=((2, 1, 3, 1, 4, 1)), dtype=torch.bfloat16, width=WIDTH, entries=None, shape=(LAYERS, HEADS)):
    """What a file has: pages of each (layer, head), and entries that differ from one another."""
    count = sum(pages) * SIZE if entries is None else entries
    content = torch.randn(2, count, width, generator=torch.Generator().manual_seed(len(label))).to(dtype)
    counts = torch.tensor(pages, dtype=torch.int32).view(shape)
    return StoredSegment(name(label, tokens=TOKENS, blocks=2), 0, 1, counts, *content, {})


def content_of(stored):
    return stored.pages, stored.keys, stored.values


def future_of(outcome):
    future = Future()
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    elif outcome is not None:
        future.set_result(outcome)
    return future


def load(state, *outcomes, blocks=2):
    """A load that was begun of files that are there, are not (an exception), or come later (None)."""
    files = list(map(future_of, outcomes))
    coming, avoided = iter(files), []
    store = SimpleNamespace(
        submit=lambda work: next(coming), avoid=lambda name, ranks: avoided.append((name, ranks)), avoided=avoided
    )
    names = [name(str(i), tokens=TOKENS, blocks=blocks) for i in range(len(files))]
    packed = [list(range(1 + blocks * i, 1 + blocks * (i + 1))) for i in range(len(files))]
    stored = StoredSegments(state, store, 0, 1, {})
    return stored, stored.begin(LoadCommand(5, names, packed)), files


def entries_at(state, first_block, packed):
    """Pages, keys and values of a published segment, as a file has them."""
    starts, lengths = state.directory.places(first_block)
    keys, values = [], []
    for start, length in zip(starts, lengths, strict=True):
        for number in range(start, start + length):
            block, cell = packed[number // CELLS], number % CELLS
            page = state.geometry.cell_pages[cell] + block * state.geometry.block_stride
            for found, entries in zip((keys, values), state.pages.read(page[None]), strict=True):
                found.append(entries)
    return torch.tensor(lengths).view(LAYERS, HEADS), torch.cat(keys), torch.cat(values)


def written(state):
    """How many pages are not as they were."""
    return int((state.pages.buffer != UNTOUCHED).any(1).sum())


@pytest.mark.parametrize(
    ("page_format", "layout", "other_format", "other_layout"),
    [(VectorPages, "LBHNC", VectorPages, "BLHNC"), (TokenPages, "BLHNC", VectorPages, "LBHNC")],
)
def test_what_every_rank_saves_is_what_it_reads_wherever_it_lay(
    tmp_path, page_format, layout, other_format, other_layout
):
    """Of two ranks, by heads in a shuffled order in scattered blocks; another server's pages may be of another kind."""
    shuffle = random.Random(3)
    background = BackgroundStore(Store(str(tmp_path), None, True), patience_s=WAIT)
    lengths, label = [2, 1, 3, 1, 4, 1], name("round trip", tokens=TOKENS, blocks=2)
    saved = []
    for rank in (0, 1):
        state, packed, cell = make_state(page_format, layout), [9, 4], 0
        starts = [0] * CELLS
        for i in shuffle.sample(range(CELLS), CELLS):
            starts[i], cell = cell, cell + lengths[i]
        state.pages.buffer.normal_(generator=torch.Generator().manual_seed(rank))
        as_laid_out = (torch.tensor(given).view(LAYERS, HEADS) for given in (starts, lengths))
        state.directory.prepare("request", *as_laid_out, TOKENS // SIZE)
        state.directory.publish("request", packed[0])
        saved.append(entries_at(state, packed[0], packed))
        StoredSegments(state, background, rank, 2, {"model": "tiny"}).save(label, packed)
        state.pages.buffer.zero_()  # after this step the blocks may be others'
    assert background.flush(WAIT)

    assert not torch.equal(saved[0][1], saved[1][1])
    for rank in (0, 1):
        state, packed = make_state(other_format, other_layout), [3, 17]
        stored = StoredSegments(state, background, rank, 2, {})
        loading = stored.begin(LoadCommand(1, [label], [packed]))
        loading.files[0].result(WAIT)
        stored.go_on(loading, deadline=float("inf"), alone=False)
        assert loading.outcome == ReadOutcome(1)
        assert len(state.directory) == 1 and packed[0] not in state.directory  # nobody reads it before all have it
        stored.conclude(loading, 1)
        for found, wanted in zip(entries_at(state, packed[0], packed), saved[rank], strict=True):
            assert torch.equal(found, wanted)
        assert int(state.directory.prefixes.span_blocks.sum()) == TOKENS // SIZE
        assert written(state) == sum(lengths)
    background.close(0)


def test_a_step_that_others_wait_for_takes_one_slice(monkeypatch, clock):
    state = make_state()
    monkeypatch.setattr(module, "SLICE_BYTES", 5 * state.pages.buffer[0].nbytes)
    stored, loading, _ = load(state, segment("one"), segment("another"))  # twelve pages each
    seen = []
    while loading.outcome is None:
        stored.go_on(loading, deadline=0.0, alone=False)
        seen.append(written(state))
        assert len(seen) < 20
    assert sorted(set(seen)) == [5, 10, 12, 17, 22, 24]
    assert loading.outcome == ReadOutcome(2)
    stored.conclude(loading, 2)
    for block, label in ((1, "one"), (3, "another")):
        wanted = segment(label)
        for found, given in zip(entries_at(state, block, [block, block + 1]), content_of(wanted), strict=True):
            assert torch.equal(found, given)
    # Without anybody to wait it takes one step.
    state = make_state()
    stored, loading, _ = load(state, segment("one"), segment("another"))
    stored.go_on(loading, deadline=clock.now + 1, alone=True)
    assert (loading.outcome, written(state)) == (ReadOutcome(2), 24)


def test_a_long_chain_is_read_a_few_files_ahead(clock):
    """Each is in memory until it is written."""
    labels = [str(i) for i in range(AHEAD + 2)]
    stored, loading, _ = load(make_state(), *(segment(label) for label in labels))
    most = 0
    while loading.outcome is None:
        stored.go_on(loading, deadline=0.0, alone=False)
        most = max(most, len(loading.files))
    assert (loading.outcome, most, loading.files) == (ReadOutcome(AHEAD + 2), AHEAD, {})


def test_a_file_that_comes_late_is_waited_for_between_steps(clock):
    state = make_state()
    stored, loading, (_, late) = load(state, segment("one"), None)
    stored.go_on(loading, deadline=clock.now + 1, alone=False)
    assert (loading.outcome, loading.written) == (None, 1)
    late.set_result(segment("another"))
    stored.go_on(loading, deadline=clock.now + 1, alone=False)
    assert loading.outcome == ReadOutcome(2)


@pytest.mark.parametrize("first", [0, 1])
def test_a_file_that_never_comes_ends_the_load_after_the_patience(clock, first):
    """Each segment before it has had as long. The file may be whole: it is not called broken."""
    stored, loading, _ = load(make_state(), *([segment("one")] * first), None, segment("behind it"))
    loading.since, over = clock.now, clock.now + PATIENCE_SECONDS * (1 + first)
    for moment, outcome in ((clock.now, None), (over - 0.01, None), (over, ReadOutcome(first))):
        clock.now = moment
        stored.go_on(loading, deadline=moment + 1, alone=True)
        assert loading.outcome == outcome


@pytest.mark.parametrize(
    "wrong",
    [
        segment("one", dtype=torch.float16),
        segment("one", dtype=torch.float32),
        segment("one", width=WIDTH // 2),
        segment("one", entries=11 * SIZE),  # a page fewer than it says
        segment("one", shape=(HEADS, LAYERS)),
        segment("one", pages=(2, 1, 3, 1, 5, 1)),  # more than fit into its two blocks
        segment("one", pages=(0,) * 6),
        segment("one", pages=(2, -1, 3, 1, 4, 1)),
    ],
    ids=["float16", "float32", "head size", "entries", "layers", "too many pages", "no page", "less than no page"],
)
def test_what_does_not_fit_this_model_is_not_written(wrong):
    state = make_state()
    stored, loading, _ = load(state, wrong)
    stored.go_on(loading, deadline=float("inf"), alone=False)
    assert (loading.outcome, written(state), len(state.directory)) == (ReadOutcome(0, broken=True), 0, 0)
    assert stored.store.avoided == [(loading.command.names[0], 1)]


@pytest.mark.parametrize(
    ("file", "broken"),
    [
        (Unusable(Reason.CUT_OFF, "cut off"), True),
        (Unusable(Reason.GONE, "gone"), False),
        (StoreAway("away"), False),
        (OSError("no answer"), False),
        (RuntimeError("a bug"), False),
        (segment("x", dtype=torch.float16), True),
    ],
    ids=["cut off", "gone", "away", "an error", "a bug", "of another dtype"],
)
def test_what_follows_a_file_that_cannot_be_read_is_of_no_use(file, broken):
    """It is looked for again, unless it can never be read."""
    state = make_state()
    stored, loading, _ = load(state, segment("one"), file, segment("behind it"))
    stored.go_on(loading, deadline=float("inf"), alone=False)
    assert loading.outcome == ReadOutcome(1, broken)
    stored.conclude(loading, 1)
    assert [block in state.directory for block in (1, 3, 5)] == [True, False, False]
    assert len(state.directory) == 1
    for found, wanted in zip(entries_at(state, 1, [1, 2]), content_of(segment("one")), strict=True):
        assert torch.equal(found, wanted)


def test_what_another_rank_could_not_read_is_given_up_here_too():
    state = make_state()
    stored, loading, _ = load(state, segment("one"), segment("another"))
    stored.go_on(loading, deadline=float("inf"), alone=False)
    assert (loading.outcome, len(state.directory)) == (ReadOutcome(2), 2)
    stored.conclude(loading, 1)
    assert [block in state.directory for block in (1, 3)] == [True, False]
    assert len(state.directory) == 1  # the other one's place in the table is free again


def test_once_weights_change_nothing_is_read_or_written(tmp_path):
    """What names say of the weights is not true any more."""
    background = BackgroundStore(Store(str(tmp_path), None, True), patience_s=WAIT)
    state, packed, label = make_state(), [9, 4], name("a", tokens=TOKENS, blocks=2)
    starts = torch.arange(CELLS).view(LAYERS, HEADS)
    state.directory.prepare("request", starts, torch.ones_like(starts), TOKENS // SIZE)
    state.directory.publish("request", packed[0])
    stored = StoredSegments(state, background, 0, 1, {})
    stored.save(label, packed)
    assert background.flush(WAIT) and len(list(tmp_path.rglob("*.safetensors"))) == 1
    stored.leave()
    stored.save(name("b", tokens=TOKENS, blocks=2), packed)
    assert background.flush(WAIT) and len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert stored.begin(LoadCommand(1, [label], [[3, 17]])).outcome == ReadOutcome(0)
    background.close(0)
