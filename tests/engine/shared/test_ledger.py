"""The books: what is counted, what is remembered, and that ids and numbers come out as they should."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsculpt_vllm.engine.shared.commands import Deferred, PoolState, SegmentCounts, Settled, StoreState
from kvsculpt_vllm.engine.shared.ledger import ERRORS, STORIES_KEPT, Histogram, Ledger
from kvsculpt_vllm.engine.shared.record import printable
from kvsculpt_vllm.store.background import BackgroundStore
from kvsculpt_vllm.store.store import Store
from records import RECORD


def test_totals_are_the_sum_of_what_was_told():
    ledger = Ledger(block_bytes=100)
    told = {"skipped": {"short": 3, "off": 2}, "found": {"cached": 2, "adopted": 1}}
    for outcome, reasons in told.items():
        for reason, times in reasons.items():
            for i in range(times):
                ledger.hear(Settled(f"{reason}-{i}", 10, outcome, reason))
    ledger.hear(Deferred("late", 800, "no_free_blocks"))
    ledger.settle("broken", 900, "failed", "exception", "ValueError: x")
    ledger.compressed(RECORD)
    ledger.compressed(replace(RECORD, request_id="again", method="select", fallback="out_of_memory", seconds=100.0))
    counts = {"hits": 3, "misses": 2, "adopted": 1, "evicted": 4, "tokens_found": 999}
    counts |= {"store_hits": 5, "store_misses": 6, "read": 7, "unreadable": 8}
    ledger.hear(SegmentCounts(**counts))
    ledger.hear(PoolState(total=50, used=20, saved=13, compressed=1, pending=2, segments=4))
    stats = ledger.stats()
    assert stats["requests"] == {
        "compressed": {"": 1},
        "found": {"adopted": 1, "cached": 2},
        "skipped": {"off": 2, "short": 3},
        "fallback": {"out_of_memory": 1},
        "failed": {"exception": 1},
    }
    assert stats["deferred"] == {"no_free_blocks": 1}
    assert (stats["span_tokens"], stats["entries_kept"], stats["blocks_freed"]) == (2 * 608, 2 * 192, 26)
    assert (stats["bytes_freed"], stats["solver_steps"]) == (2600, 14)
    assert (stats["segments"], stats["remade"], stats["found"]) == (2, 0, counts)
    assert sum(stats["seconds"]["counts"]) == 2 and stats["seconds"]["sum"] == 101.5
    assert stats["held_out_error"]["after"]["sum"] == pytest.approx(0.04)
    assert stats["pool"] == {
        **{"total": 50, "used": 20, "saved": 13, "compressed": 1, "pending": 2, "segments": 4},
        "bytes_saved": 1300,
    }
    assert json.loads(json.dumps(stats)) == stats


def test_a_store_that_the_scheduler_cannot_ask_is_away_though_this_worker_never_needed_it(tmp_path):
    """Who only reads has nothing to read while look-ups have no answer."""
    assert Ledger(block_bytes=100).stats()["store"] == {}
    ledger = Ledger(block_bytes=100, store=BackgroundStore(Store(str(tmp_path), None, False), patience_s=1))
    told = ledger.stats()["store"]
    assert (told["failures"], told["unanswered"], told["away"], told["writes_away"]) == (0, 0, False, False)
    ledger.hear(StoreState(failures=3, unanswered=2, away=True))
    told = ledger.stats()["store"]
    assert (told["failures"], told["unanswered"], told["away"], told["writes_away"]) == (3, 2, True, False)
    ledger.hear(StoreState(failures=3, unanswered=2))
    assert not ledger.stats()["store"]["away"]


@given(st.lists(st.floats(0, 10), max_size=30))
def test_a_histogram_counts_each_value_below_the_bounds_it_does_not_exceed(values):
    histogram = Histogram(ERRORS)
    for value in values:
        histogram.observe(value)
    told = histogram.as_dict()
    for i, bound in enumerate(told["bounds"]):
        assert sum(told["counts"][: i + 1]) == sum(value <= bound for value in values)
    assert sum(told["counts"]) == len(values)


def test_the_newest_come_first_and_many_short_prompts_do_not_drive_out_a_compression():
    ledger = Ledger(1)
    ledger.compressed(RECORD)
    for i in range(STORIES_KEPT + 5):
        ledger.hear(Settled(f"short-{i}", 10, "skipped", "short"))
    newest = ledger.newest(1000)
    assert len(newest) == STORIES_KEPT + 1
    assert newest[0]["request_id"] == f"short-{STORIES_KEPT + 4}"
    assert newest[-1]["compression"]["method"] == "sculpt"
    assert "budgets" not in newest[-1]["compression"]
    assert ledger.newest(2) == newest[:2]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("cmpl-1", True),  # what the client knows
        ("cmpl-1-0", True),
        ("cmpl-1-0-0123abcd", True),  # what the engine calls it
        ("cmpl", False),
        ("cmpl-.", False),
        ("0123abcd", False),
        ("", False),
    ],
)
def test_a_request_is_found_by_the_clients_id(asked, found):
    ledger = Ledger(1)
    ledger.compressed(RECORD)
    story = ledger.find(asked)
    assert (story is not None) == found
    if found:
        assert story["compression"]["budgets"] == [[128, 256]]


def test_a_request_that_waited_and_was_compressed_then_has_one_story():
    ledger = Ledger(1)
    ledger.hear(Deferred(RECORD.request_id, 700, "no_free_blocks"))
    assert ledger.find("cmpl-1")["outcome"] == "deferred"
    ledger.compressed(RECORD)
    assert [story["outcome"] for story in ledger.newest(10)] == ["compressed"]


def test_the_segments_of_a_request_are_one_story_and_count_as_one_request():
    ledger = Ledger(block_bytes=100)
    ledger.compressed(RECORD)
    more = {"span_tokens": 1824, "blocks_freed": 30, "error_after": 0.06, "times_made": 3}
    more = replace(RECORD, budgets=[[64, 32]], errors=[[0.05, 0.07]], **more)
    ledger.compressed(more, first_of_request=False)
    (story,) = ledger.newest(10)
    whole = ledger.find(RECORD.request_id)["compression"]
    assert story["compression"]["segments"] == whole["segments"] == 2
    assert (whole["span_tokens"], whole["blocks_freed"], whole["entries_kept"]) == (608 + 1824, 43, 384)
    assert whole["budgets"] == [[192, 288]]
    # Means over the tokens.
    assert whole["error_after"] == pytest.approx((608 * 0.02 + 1824 * 0.06) / 2432)
    assert whole["errors"] == [pytest.approx([0.25 * 0.01 + 0.75 * 0.05, 0.25 * 0.03 + 0.75 * 0.07])]
    stats = ledger.stats()
    assert stats["requests"]["compressed"] == {"": 1}
    assert (stats["segments"], stats["remade"]) == (2, 2)
    # It lost its blocks, and all is made anew.
    ledger.compressed(RECORD)
    assert ledger.find(RECORD.request_id)["compression"]["span_tokens"] == 608


def test_a_failure_whose_request_ends_before_the_scheduler_hears_of_it_is_counted_once():
    ledger = Ledger(1)
    ledger.settle("a", 900, "failed", "exception", "ValueError: x")
    ledger.hear(Settled("a", 900, "skipped", "ended_first"))
    ledger.hear(Settled("b", 900, "skipped", "ended_first"))
    assert ledger.stats()["requests"]["failed"] == {"exception": 1}
    assert ledger.stats()["requests"]["skipped"] == {"ended_first": 1}
    assert ledger.find("a")["detail"] == "ValueError: x"


def test_an_id_cannot_break_a_log_line_or_color_it():
    assert printable("a\nb\x1b[31m\u2028é") == "a\\nb\\x1b[31m\\u2028é"
