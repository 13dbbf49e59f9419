"""A store that is slow, full or gone costs hits, and nothing else: nobody waits, and the log says it once."""

import errno
import logging
import subprocess
import sys
import threading
import time

import pytest

from kvsculpt_vllm.store.background import BackgroundStore, StoreAway
from kvsculpt_vllm.store.store import Store
from kvsculpt_vllm.store.unusable import Reason, Unusable
from stored import PARENT, name, same, segment

WAIT = 30  # seconds; a test that waits so long has failed


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path), None, True)


@pytest.fixture
def behind(store):
    """A function that puts the store behind threads; they end with the test."""
    opened = []

    def put(**settings):
        opened.append(BackgroundStore(store, **{"patience_s": WAIT, **settings}))
        return opened[-1]

    yield put
    for background in opened:
        background.close(0)


@pytest.fixture
def said(caplog):
    """What the log has said, as a function."""
    caplog.set_level(logging.INFO, "vllm.kvsculpt")
    caplog.handler.setLevel(logging.INFO)
    logging.getLogger("vllm.kvsculpt").addHandler(caplog.handler)  # vLLM's loggers do not propagate
    yield lambda: list({id(record): record.getMessage() for record in caplog.records}.values())
    logging.getLogger("vllm.kvsculpt").removeHandler(caplog.handler)


@pytest.fixture
def hanging():
    """Work that takes until the test ends."""
    release = threading.Event()
    yield lambda store: release.wait(WAIT)
    release.set()


def fail(store):
    raise OSError(errno.EIO, "no answer")


def test_segments_are_written_read_and_counted(behind):
    background, stored = behind(), segment()
    assert background.write(lambda: stored)
    assert background.write(lambda: stored)
    assert background.close(WAIT)
    background = behind()  # the other one is closed
    assert background.submit(lambda store: store.find(PARENT, 1)).result(WAIT) == [stored.name]
    assert same(background.submit(lambda store: store.read(stored.name, 0, 1)).result(WAIT), stored)
    counts = background.counts()
    assert (counts.reads, counts.writes, counts.refused["there"]) == (1, 1, 0)
    assert counts.bytes_read == counts.bytes_written > stored.nbytes
    assert not counts.away


def test_a_refused_write_is_counted_by_its_reason(behind):
    background = behind()
    for _ in range(2):
        background.write(segment)
    background.write(lambda: 1 / 0)
    assert background.close(WAIT)
    counts = background.counts()
    assert (counts.writes, counts.refused["there"], counts.refused["unmade"]) == (1, 1, 1)


def test_one_that_does_not_answer_is_given_up_and_left_alone(behind, hanging, said):
    background = behind(patience_s=0.05)
    slow = [background.submit(hanging) for _ in range(6)]  # more than there are readers
    for future in slow:
        with pytest.raises(StoreAway):
            future.result(WAIT)
    with pytest.raises(StoreAway):  # at once: it is not asked
        background.submit(lambda store: 1).result(0)
    assert background.counts().away
    assert background.counts().unanswered == 7
    assert len([line for line in said() if "has not answered within 0.05 s" in line]) == 1


def test_after_a_pause_it_is_tried_again_by_other_threads(behind, hanging, said):
    background = behind(patience_s=0.05, pause_s=0.1)
    first = [background.submit(hanging) for _ in range(4)]  # all readers
    for future in first:
        with pytest.raises(StoreAway):
            future.result(WAIT)
    deadline = time.monotonic() + WAIT
    while background.counts().away and time.monotonic() < deadline:
        time.sleep(0.01)
    assert background.submit(lambda store: 1).result(WAIT) == 1
    assert [line.partition(": ")[2][:16] for line in said()] == ["it has not answe", "it works again."]


def test_threads_that_hang_are_not_made_without_end(behind, hanging):
    background = behind(patience_s=0.02, pause_s=0)
    for _ in range(12):
        with pytest.raises(StoreAway):
            background.submit(hanging).result(WAIT)
    stuck = [thread for thread in threading.enumerate() if thread.name == "kvsculpt-store-read"]
    assert len(stuck) <= 8 + 4
    assert background.counts().away


@pytest.mark.parametrize("store_fails_first", [True, False])
def test_failures_in_a_row_begin_an_outage_and_single_ones_do_not(behind, said, store_fails_first):
    background = behind()
    for _ in range(2):
        with pytest.raises(OSError, match="no answer"):
            background.submit(fail).result(WAIT)
    if not store_fails_first:
        assert background.submit(lambda store: 1).result(WAIT) == 1
    with pytest.raises(OSError, match="no answer"):
        background.submit(fail).result(WAIT)
    counts = background.counts()
    assert counts.failures == 3
    assert counts.away == store_fails_first
    assert len([line for line in said() if "no answer" in line]) == store_fails_first


def test_an_outage_is_said_once_however_long_it_is(behind, said):
    background = behind(pause_s=0)
    for _ in range(9):
        with pytest.raises(OSError, match="no answer"):
            background.submit(fail).result(WAIT)
    assert background.submit(lambda store: 1).result(WAIT) == 1
    assert len(said()) == 2


def test_a_full_disk_does_not_keep_anybody_from_reading(behind, store, said, monkeypatch):
    assert store.write(segment())

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store._place, "write", full)
    background = behind()
    for i in range(5):
        background.write(lambda i=i: segment(f"{i}"))
    assert background.close(WAIT)
    counts = background.counts()
    assert (counts.refused["failed"], counts.refused["away"], counts.writes) == (3, 2, 1)
    assert counts.writes_away
    assert not counts.away
    assert len([line for line in said() if "cannot be written to" in line and "No space left" in line]) == 1


def test_a_full_queue_drops_what_comes_and_counts_it(behind, said):
    background, release = behind(most_writes=3, most_bytes=100), threading.Event()

    def make(label):
        release.wait(WAIT)
        return segment(label)

    assert background.write(lambda: make("a"), 60)
    assert not background.write(lambda: make("b"), 60)  # too many bytes
    assert background.write(lambda: make("c"), 20)
    assert background.write(lambda: make("d"), 20)
    assert not background.write(lambda: make("e"), 0)  # too many
    release.set()
    assert background.close(WAIT)
    assert background.counts().refused["queue_full"] == 2
    assert background.counts().writes == 3
    assert len(said()) == 1


def test_an_unusable_file_is_said_once_a_reason_and_is_no_outage(behind, said):
    def unusable(reason):
        def read(store):
            raise Unusable(reason, f"file {reason}")

        return read

    background = behind()
    for reason in [Reason.ALTERED] * 4 + [Reason.CUT_OFF]:
        with pytest.raises(Unusable):
            background.submit(unusable(reason)).result(WAIT)
    counts = background.counts()
    assert (counts.unusable["altered"], counts.unusable["cut_off"], counts.unusable["foreign"]) == (4, 1, 0)
    assert not counts.away
    assert len(said()) == 2


def test_whatever_work_raises_belongs_to_who_asked_and_the_threads_go_on(behind):
    background = behind()
    for error in (SystemExit(3), MemoryError(), KeyError("x")) * 3:

        def work(store, error=error):
            raise error

        with pytest.raises(type(error)):
            background.submit(work).result(WAIT)
    assert background.submit(lambda store: 1).result(WAIT) == 1
    assert not background.counts().away


def test_a_look_up_that_nobody_wants_any_more_is_not_done(behind):
    background, done, release = behind(), [], threading.Event()
    busy = [background.submit(lambda store: release.wait(WAIT)) for _ in range(4)]
    unwanted = background.submit(lambda store: done.append(1))
    assert unwanted.cancel()
    release.set()
    assert all(future.result(WAIT) for future in busy)
    assert background.submit(lambda store: 1).result(WAIT) == 1
    assert not done


def test_closing_answers_what_waits(behind, hanging):
    background = behind()
    futures = [background.submit(hanging) for _ in range(5)]
    background.close(0)
    with pytest.raises(StoreAway):
        futures[-1].result(0)
    with pytest.raises(StoreAway):
        background.submit(lambda store: 1).result(0)
    assert not background.write(segment)


def test_a_read_file_that_is_altered_comes_to_the_caller(behind, store):
    stored = segment()
    store.write(stored)
    data = bytearray(store._place.read(stored.path))
    data[-1] ^= 1
    store._place.write(stored.path, bytes(data))
    with pytest.raises(Unusable):
        behind().submit(lambda store: store.read(name(), 0, 1)).result(WAIT)
    assert store.find(PARENT, 1) == []


def test_hanging_threads_do_not_keep_the_process_from_ending(tmp_path):
    script = """
import sys, time
from kvsculpt_vllm.store.background import BackgroundStore
from kvsculpt_vllm.store.store import Store
background = BackgroundStore(Store(sys.argv[1], None, True), patience_s=60)
background.submit(lambda store: time.sleep(600))
background.write(lambda: time.sleep(600))
assert not background.close(0.05)
print("over")
"""
    job = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (job.returncode, job.stdout) == (0, "over\n"), job.stderr


def test_a_store_of_its_own_is_not_touched_before_it_is_asked(tmp_path):
    before = set(threading.enumerate())
    BackgroundStore(Store(str(tmp_path / "none"), None, True), patience_s=1)
    assert set(threading.enumerate()) == before
    assert not (tmp_path / "none").exists()
