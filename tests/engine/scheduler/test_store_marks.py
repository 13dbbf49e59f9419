"""The store hears which segments are used in memory, and not at every request."""

from concurrent.futures import Future
from types import SimpleNamespace

from kvsculpt_vllm.engine.scheduler.store_marks import EVERY, StoreMarks


class Background:
    """Does what it is given at once, on a store that writes down what it hears."""

    def __init__(self):
        self.heard = []

    def submit(self, work):
        work(SimpleNamespace(mark_used=lambda parent, key: self.heard.append((parent, key))))
        return Future()


def segment(key, shared=True):
    return SimpleNamespace(key=key, parent=b"of " + key, shared=shared)


def test_each_segment_is_told_of_once_in_a_while():
    background, clock = Background(), [5.0]
    marks = StoreMarks(background, lambda: clock[0])
    chain = [segment(b"a"), segment(b"b"), segment(b"own", shared=False)]
    marks.used(chain)
    assert background.heard == [(b"of a", b"a"), (b"of b", b"b")]
    clock[0] += EVERY / 2
    marks.used([*chain, segment(b"c")])
    assert background.heard[2:] == [(b"of c", b"c")]
    clock[0] += EVERY / 2
    marks.used([*chain, segment(b"c")])
    assert background.heard[3:] == [(b"of a", b"a"), (b"of b", b"b")]
    marks.used([])
    assert len(background.heard) == 5


def test_what_was_told_long_ago_is_forgotten():
    background, clock = Background(), [0.0]
    marks = StoreMarks(background, lambda: clock[0])
    for number in range(100):
        marks.used([segment(bytes([number]))])
        clock[0] += EVERY
    assert len(marks._told) <= 2
