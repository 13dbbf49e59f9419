"""What is written is found and read, on every kind of file system; better makes replace worse ones."""

import pytest
from fsspec.registry import known_implementations

from kvsculpt_vllm.store.store import Refusal, Store
from kvsculpt_vllm.store.unusable import Reason, Unusable
from stored import PARENT, name, same, segment


def test_what_was_written_is_found_and_read_by_another_server(url):
    writer, stored = Store(url, None, True), segment()
    writer.check()
    assert writer.find(PARENT, 1) == []
    assert writer.write(stored)
    reader = Store(url, None, False)
    reader.check()
    assert reader.find(PARENT, 1) == [stored.name]
    assert same(reader.read(stored.name, 0, 1), stored)
    assert reader.read_about(stored.name, 0, 1) == stored.about
    assert reader.find(stored.name.key, 1) == []


def test_a_segment_is_found_once_all_ranks_have_written_it(store):
    store.write(segment(rank=1, ranks=2))
    assert store.find(PARENT, 2) == []
    store.write(segment(rank=0, ranks=2))
    assert store.find(PARENT, 2) == [name()]
    assert store.find(PARENT, 1) == []
    assert store.read(name(), 1, 2).keys[0, 0] == 1000


def test_the_longest_comes_first_and_of_one_key_the_best(store):
    best = name("a", effort="thorough", made="00000001")
    for ranks in (1, 2):  # what two ranks need is no use to one
        for rank in range(ranks):
            for made in (name("a"), name("long", tokens=4096), best):
                store.write(segment(rank=rank, ranks=ranks, **vars(made)))
    assert store.find(PARENT, 1) == [name("long", tokens=4096), best]


@pytest.mark.parametrize("better", [{"effort": "balanced", "error": 0.02}, {"error": 0.0122}])
def test_a_better_make_takes_the_place_of_a_worse_one_and_not_the_other_way(store, better):
    first, second = segment(), segment(**better, made="00000002")
    assert store.put(first) is None
    assert store.put(first) is Refusal.THERE
    assert store.put(segment(made="00000003")) is Refusal.THERE  # as good
    assert store.put(second) is None
    assert [entry.name for entry in store.entries()] == [second.name]
    assert store.put(first) is Refusal.THERE


def test_a_worse_make_stays_until_all_ranks_have_the_better_one(store):
    for rank in (0, 1):
        store.write(segment(rank=rank, ranks=2))
    better = [segment(rank=rank, ranks=2, effort="balanced", made="00000002") for rank in (0, 1)]
    store.write(better[0])
    assert store.find(PARENT, 2) == [name()]
    store.write(better[1])
    assert store.find(PARENT, 2) == [better[0].name]
    assert len(store.entries()) == 1


def test_removing_takes_all_ranks_and_the_empty_folder(directory):
    store = Store(str(directory), None, True)
    for rank in (0, 1):
        store.write(segment(rank=rank, ranks=2))
    size = store.entries()[0].size
    assert store.remove(name()) == size
    assert list(directory.iterdir()) == []


def test_what_others_have_removed_is_gone(store):
    store.write(segment())
    store.remove(name())
    with pytest.raises(Unusable) as error:
        store.read(name(), 0, 1)
    assert error.value.reason == Reason.GONE
    assert store.write(segment())  # and may come again
    assert store.find(PARENT, 1) == [name()]


def test_a_store_that_is_read_only_is_not_written_to(url):
    Store(url, None, True).check()
    assert Store(url, None, False).put(segment()) is Refusal.READ_ONLY
    assert Store(url, None, False).entries() == []


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "neither a directory nor a URL"),
        ("s3:/bucket/folder", "neither a directory nor a URL"),
        ("nosuch://bucket", "there is no protocol nosuch"),
        ("sftp://user:secret@localhost:1/x", "sftp://user:\\*\\*\\*@localhost"),
    ],
)
def test_a_url_that_means_nothing_is_told_with_what_it_needs(url, says):
    with pytest.raises(ValueError, match=says) as error:
        Store(url, None, True)
    assert "secret" not in str(error.value)


def test_a_url_whose_package_is_missing_is_told_with_what_to_install(monkeypatch):
    missing = {"class": "no_such_package.FileSystem", "err": "Install no_such_package to access it"}
    monkeypatch.setitem(known_implementations, "elsewhere", missing)
    with pytest.raises(ValueError, match="elsewhere://bucket: Install no_such_package to access it"):
        Store("elsewhere://bucket", None, True)


def test_a_size_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="allowed: more than 0"):
        Store(str(tmp_path), 0, True)
