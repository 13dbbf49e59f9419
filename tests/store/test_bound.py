"""A store keeps to its size: what was used longest ago goes first, and what nobody will finish."""

import os
import time

import pytest

from kvsculpt_vllm.store import store as store_module
from kvsculpt_vllm.store.file import encode
from kvsculpt_vllm.store.places import partial_name
from kvsculpt_vllm.store.store import Refusal, Store
from stored import PARENT, name, segment

SIZE = len(encode(segment("a")))


def labels(store):
    by_key = {name(label).key: label for label in "abcdefgh"}
    return "".join(sorted(by_key[entry.name.key] for entry in store.entries()))


def age(directory, label, hours, rank=0, ranks=1):
    then = time.time() - hours * 3600
    os.utime(directory / name(label).path(rank, ranks), (then, then))


def test_what_was_read_last_goes_last(directory):
    store = Store(str(directory), None, True)
    for i, label in enumerate("abcd"):
        store.write(segment(label))
        age(directory, label, 9 - i)
    store.read(name("a"), 0, 1)  # no longer the oldest
    assert Store(str(directory), 3 * SIZE, True).sweep() == 3 * SIZE
    assert labels(store) == "acd"
    Store(str(directory), 2 * SIZE - 1, True).sweep()
    assert labels(store) == "a"


def test_what_is_used_in_memory_counts_as_read(directory):
    store = Store(str(directory), None, True)
    for i, label in enumerate("abc"):
        for rank in (0, 1):
            store.write(segment(label, rank, 2))
            age(directory, label, 9 - i, rank, 2)
    Store(str(directory), None, False).mark_used(PARENT, name("a").key)  # a reader's use is nobody's business
    assert [entry.name for entry in store.entries()] == [name("a"), name("b"), name("c")]
    store.mark_used(PARENT, name("a").key)
    store.mark_used(PARENT, b"none such")
    assert [entry.name for entry in store.entries()] == [name("b"), name("c"), name("a")]


def test_a_read_only_server_does_not_make_anything_look_used(directory):
    Store(str(directory), None, True).write(segment())
    age(directory, "a", 5)
    reader = Store(str(directory), None, False)
    reader.read(name(), 0, 1)
    assert reader.entries()[0].used < time.time() - 4 * 3600


def test_all_ranks_files_go_together_and_age_together(directory):
    store = Store(str(directory), 4 * SIZE, True)
    for label in "ab":
        for rank in (0, 1):
            store.write(segment(label, rank, 2))
            age(directory, label, {"a": 9, "b": 5}[label], rank, 2)
    store.read(name("a"), 1, 2)  # by one of its ranks
    Store(str(directory), 3 * SIZE, True).sweep()
    assert labels(store) == "a"
    assert store.find(PARENT, 2) == [name("a")]


def test_writing_keeps_to_the_size_and_seldom_lists_the_store(url, monkeypatch):
    store, listed = Store(url, 50 * SIZE, True), []
    store.check()
    files = store._place.files
    monkeypatch.setattr(store._place, "files", lambda: listed.append(1) or files())
    for i in range(60):
        assert store.write(segment(f"{i}"))
        assert sum(entry.size for entry in _entries(store, files)) <= 50 * SIZE
    assert len(_entries(store, files)) >= 47
    assert store.find(PARENT, 1)
    assert len(listed) <= 1 + 10 / 2 + 1  # 5 % of the bound are two segments


def _entries(store, files):
    return store_module._grouped(files())


def test_what_other_servers_have_written_is_seen_after_a_while(directory, monkeypatch):
    ours, other = Store(str(directory), 3 * SIZE, True), Store(str(directory), None, True)
    ours.write(segment("a"))
    for i, label in enumerate("bcde"):
        other.write(segment(label))
        age(directory, label, 9 - i)
    monkeypatch.setattr(store_module, "LISTED", 0.0)
    ours.write(segment("f"))
    assert labels(ours) == "af"


@pytest.mark.parametrize("size", [1, SIZE - 1])
def test_what_is_larger_than_the_store_is_not_written(url, size):
    store = Store(url, size, True)
    store.check()
    assert store.put(segment()) is Refusal.TOO_LARGE
    assert store.entries() == []
    assert Store(url, SIZE, True).write(segment())
    assert len(store.entries()) == 1


def test_what_writers_left_over_goes_after_an_hour_and_nothing_of_others(directory):
    store = Store(str(directory), None, True)
    store.write(segment("a", 0, 2))  # the other rank's never came
    store.write(segment("b"))
    folder = directory / PARENT.hex()
    ours = [directory / partial_name(name("c").path(0, 1)), directory / partial_name("check")]
    empty = directory / ("0" * 64)
    empty.mkdir()
    others = [directory / "notes.txt", folder / "notes.partial", directory / ".hidden"]
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir()
    for path in (*ours, *others, elsewhere / ours[0].name):
        path.write_text("x")
    store.sweep()
    assert all(path.exists() for path in ours)  # they may still be written
    assert labels(store) == "ab"
    assert not empty.exists()
    for path in (*ours, *others, elsewhere / ours[0].name, directory / name("a").path(0, 2)):
        os.utime(path, (0, 0))
    store.sweep()
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in (*others, elsewhere / ours[0].name))
    assert labels(store) == "b"


def test_a_make_that_was_replaced_while_its_writer_died_goes(directory):
    store = Store(str(directory), None, True)
    worse = segment()
    store.write(worse)
    old = (directory / worse.path).read_bytes()
    better = segment(effort="balanced", made="00000002")
    store.write(better)
    (directory / worse.path).write_bytes(old)
    store.sweep()
    assert [entry.name for entry in store.entries()] == [better.name]
