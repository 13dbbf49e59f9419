"""What the scheduler does, on vLLM's real scheduler and block pool: at random, and in cases that were hard."""

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from vllm.v1.request import RequestStatus

from kvsculpt_vllm.engine.scheduler.scheduler import SculptAsyncScheduler, SculptScheduler
from kvsculpt_vllm.engine.shared.commands import PoolState
from kvsculpt_vllm.engine.shared.prefix_wish import TOKENS, Wish
from scheduler_machine import EVENTS, NUM_BLOCKS, Machine
from worker_double import BLOCK

LONGEST = 800
"""Tokens of a request of the machine with windows, at most."""


OF_STORE = ("read", "unreadable")
"""What happens with a store alone."""

EXAMPLES = int(os.environ.get("KVSCULPT_TEST_EXAMPLES", "250"))
"""Fewer on the second vLLM (Makefile): the store, which knows no vLLM, is not read in so few."""


def test_whatever_happens_no_block_is_lost_or_read_by_another(machine):
    case = machine.TestCase
    case.settings = settings(
        max_examples=EXAMPLES,
        stateful_step_count=70,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # a failure is to be told at once; shrinking it takes minutes
        suppress_health_check=list(HealthCheck),
    )
    machine.seen.clear()
    case("runTest").runTest()
    # It did happen.
    of_many = OF_STORE if EXAMPLES < 250 else ()
    rare = [event for event in EVENTS if not machine.seen[event] and event not in of_many]
    assert not rare, f"{rare} never happened, only {dict(machine.seen)}"


def test_a_prompt_to_be_compressed_does_not_end_with_a_chunk_of_one_token(machine):
    case = machine()
    case.start(asynchronous=False, blocks=NUM_BLOCKS)
    case.arrive(length=321, family=0, shared=0, generate=5, compress=None)  # two chunks of 160, one token left
    case.step(0, fails=False)
    case.step(0, fails=False)
    assert case.worker.chunks == {"r1": 159}
    case.teardown()
    case.start(asynchronous=False, blocks=NUM_BLOCKS)
    case.arrive(length=321, family=0, shared=0, generate=5, compress="none")
    case.step(0, fails=False)
    case.step(0, fails=False)
    assert case.worker.chunks == {"r1": 160}
    case.teardown()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_prompt_takes_the_blocks_that_a_compression_needs(machine, monkeypatch, asynchronous):
    """Many prompts at once: each finds room to be compressed, so that none has to be preempted for an answer."""

    def run() -> Counter:
        monkeypatch.setattr(Machine, "seen", Counter())
        case = machine()
        case.start(asynchronous=asynchronous, blocks=24)
        for number in range(12):
            case.arrive(length=320, family=number, shared=0, generate=60, compress=None)
        case.teardown()
        return case.seen

    seen = run()
    assert seen["commit"] == 12 and not seen["deferral"] and not seen["preemption"], seen
    # vLLM's own admission would not do.
    monkeypatch.setattr(SculptScheduler, "admits", lambda *args: True)
    monkeypatch.setattr(SculptAsyncScheduler, "admits", lambda *args: True)
    seen = run()
    assert seen["deferral"] or seen["preemption"], seen


def test_a_compression_is_given_up_when_an_exact_request_comes_to_hold_its_blocks(machine, monkeypatch):
    """Nothing would come free. When the exact one has finished it begins anew."""
    monkeypatch.setattr(Machine, "seen", Counter())
    case = machine()
    case.start(asynchronous=False, blocks=100, segment=4096)
    document = list(range(20 * BLOCK))
    case.add([*document, *[7000] * 4], 60, None)
    for _ in range(6):
        case.step(6, fails=False)
    assert case.worker.solving is not None and case.worker.pool.used == 21 + 6
    case.add([*document, *[8000] * 4], 8, "none")
    case.step(6, fails=False)
    assert case.seen["cancel"] == 1 and case.worker.solving is None
    assert case.worker.pool.used == 21 + 1  # what stock vLLM holds
    for _ in range(20):
        case.step(2, fails=False)
    assert case.seen["commit"] == 1 and case.worker.pool.used < 10
    case.teardown()


MOMENTS = {
    "together": 0,  # in the same step as the first
    "while the first is computed": 5,
    "before its compression begins": 20,
    "in the middle of its compression": 22,
    "in the last step of its compression": 23,
    "after its compression": 30,
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_prompts_that_share_their_blocks_hold_no_more_than_without_compression(machine, moment, asynchronous):
    """A prompt of 100 blocks runs; three with the same first 99 come. Nothing is held twice."""

    def held(compress) -> list[int]:
        case = machine()
        case.start(asynchronous=asynchronous, blocks=300, segment=4096)
        document = list(range(99 * BLOCK))
        used = []

        def steps(count):
            for _ in range(count):
                case.step(3, fails=False)
                # Without the blocks that are being filled for all of them.
                filled = sum(len(pending.packed) for pending in case.scheduler._pending.values())
                used.append(case.worker.pool.used - filled)

        case.add([*document, *[7000] * 4], 27, compress)
        steps(MOMENTS[moment])
        for number in range(3):
            case.add([*document, *[8000 + number] * 4], 27, compress)
        steps(25)
        case.teardown()
        return used[MOMENTS[moment] :]

    exact, ours = held("none"), held(None)
    assert max(ours) <= max(exact) == 100 + 3
    # Sculpted once, for all four: 29 blocks, and a tail for each.
    assert min(ours[:-3]) <= 30 + 4 * 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_prompts_whose_queries_find_no_room_are_compressed_when_there_is(machine, monkeypatch, asynchronous):
    """Four prompts at once, and room for the queries of one at a time."""
    monkeypatch.setattr(Machine, "seen", Counter())
    case = machine()
    case.start(asynchronous=asynchronous, blocks=100)
    case.scheduler._samples._room = 400
    for number in range(4):
        case.add([10_000 * number + i for i in range(320)], 200, None)
    for _ in range(110):
        case.step(2, fails=False)
    assert case.seen["commit"] == 4 and case.seen["rewound"] == 3, case.seen
    assert case.worker.pool.pending == 0
    case.teardown()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("steps", [0, 3, 9])
def test_a_prompt_longer_than_the_memory_is_served_without_a_preemption(machine, monkeypatch, steps, asynchronous):
    monkeypatch.setattr(Machine, "seen", Counter())
    case = machine()
    case.start(asynchronous=asynchronous, blocks=40)
    case.add(list(range(2300)), 20, None)
    for _ in range(400):
        if not (case.scheduler.has_requests() or case.in_flight):
            break
        case.step(steps, fails=False)
    assert case.seen["commit"] == 9 and not case.seen["preemption"]
    assert case.worker.told["r1"] == 9
    case.teardown()


HOPELESS = {
    # What it is, and whether every solve loses too much.
    "a pattern that stays exact": ([1, 2, 3] * 400, False),
    "all of it has to be kept": (list(range(1200)), True),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("what", HOPELESS)
def test_a_request_that_cannot_fit_ends_and_holds_nobody_up(machine, what, asynchronous):
    """The front end refuses it where it can know: with several API servers not all of them do."""
    tokens, fails = HOPELESS[what]
    case = machine()
    case.start(asynchronous=asynchronous, blocks=29)
    case.add(tokens, 10, None)
    case.add([9000 + i for i in range(300)], 10, None)
    for _ in range(400):
        if not (case.scheduler.has_requests() or case.in_flight):
            break
        case.step(1, fails="loses too much" if fails else False)
    assert not case.scheduler.has_requests()
    case.teardown()


def test_what_is_saved_is_what_stock_vllm_would_hold_besides(machine):
    """The same arrivals with and without compression: used + saved are the blocks that the exact ones hold."""

    def run(compress) -> list[PoolState]:
        case = machine()
        case.start(asynchronous=False, blocks=300)
        states = []
        document = list(range(30 * BLOCK))
        for prompt in (
            [*document, 7000],
            [*document, 7001],
            [*document[: 20 * BLOCK], *[7002] * 200],
            list(range(7003, 7503)),
        ):
            case.add(prompt, 40, compress)
            for _ in range(12):
                case.step(1, fails=False)
                states.append(case.worker.pool)
        case.teardown()
        return states

    exact, ours = run("none"), run(None)
    # When everything that has come is computed and compressed.
    settled = (11, 23, 35, 43)
    assert [ours[i].used + ours[i].saved for i in settled] == [exact[i].used for i in settled]
    assert all(ours[i].saved > 0 and ours[i].pending == 0 for i in settled)
    # The second one found what the first was given: it holds its tail, as it would in stock vLLM.
    assert ours[23].compressed == 2 and ours[23].saved == ours[11].saved and ours[23].used == ours[11].used + 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_pin_gives_way_to_a_request_that_fits_into_the_memory(machine, asynchronous):
    case = machine()
    case.start(asynchronous=asynchronous, blocks=NUM_BLOCKS)
    case.add(list(range(400)), TOKENS, None, Wish("pinned", pin=True))
    run_to_the_end(case)
    assert case.scheduler._prefixes.pinned_blocks
    # A short one comes behind it, and is not held up for ever.
    case.add([50_000 + i for i in range((NUM_BLOCKS - 2) * BLOCK)], 5, "none")
    case.add([90_000 + i for i in range(40)], 5, "none")
    run_to_the_end(case)
    assert not case.scheduler._prefixes.pinned_blocks
    case.teardown()


def test_a_pin_whose_time_is_over_is_gone_at_the_next_step(machine):
    case = machine()
    case.start(asynchronous=False, blocks=NUM_BLOCKS)
    case.add(list(range(500)), TOKENS, None, Wish("pinned", pin=True, ttl=1e-6))
    run_to_the_end(case)
    case.add([50_000 + i for i in range(40)], 5, "none")
    case.step(0, fails=False)
    assert not case.scheduler._prefixes._prefixes
    case.teardown()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("length", [240, 320])
def test_a_prefix_is_not_held_for_queries_that_found_no_room(machine, asynchronous, length):
    case = machine()
    case.start(asynchronous=asynchronous, blocks=100)
    case.scheduler._samples._room = 400
    case.add([10_000 + i for i in range(320)], 100, None)
    case.step(2, fails=False)
    case.add([20_000 + i for i in range(length)], TOKENS, None, Wish("late"))
    for _ in range(200):
        case.step(2, fails=False)
    assert case.scheduler._prefixes._prefixes["late"].chain
    case.teardown()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_answer_that_is_computed_again_does_not_wait_for_the_store(machine, monkeypatch, asynchronous):
    monkeypatch.setattr(Machine, "seen", Counter())
    case = machine()
    case.start(asynchronous=asynchronous, blocks=NUM_BLOCKS, store=True)
    case.add([30_000 + i for i in range(100)], 400, None)
    while not case.scheduler.running:
        case.step(0, fails=False)
    monkeypatch.setattr(case.worker.store, "answer", lambda: None)  # it hangs from now on
    away = 0
    for _ in range(500):
        case.step(5, fails=False)
        away = 0 if case.scheduler.running or not case.scheduler.requests else away + 1
        assert away <= 2 * case.depth  # it is back when its tokens in flight have been heard of
    assert case.seen["rewound"] and not case.scheduler.requests
    case.teardown()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("what", ["its request ends", "the cache is reset"])
def test_a_load_that_nobody_waits_for_any_more_gives_its_blocks_back(machine, monkeypatch, asynchronous, what):
    monkeypatch.setattr(Machine, "seen", Counter())
    case = machine()
    case.start(asynchronous=asynchronous, blocks=NUM_BLOCKS, store=True)
    prompt = [30_000 + i for i in range(500)]
    case.add(prompt, 5, None)
    run_to_the_end(case)
    case.reset_cache(running=False)
    case.add(prompt, 5, None)
    for _ in range(20):
        if case.worker.loading is not None:
            break
        case.step(4, fails=False)
    assert case.worker.loading is not None
    if what == "the cache is reset":
        case.scheduler.reset_prefix_cache(reset_running_requests=True)
    else:
        case.scheduler.finish_requests(case.scheduler._load.request_id, RequestStatus.FINISHED_ABORTED)
    assert case.scheduler._load is None and case.pool.get_num_free_blocks() == NUM_BLOCKS - 1
    case.add([60_000 + i for i in range(500)], 5, None)  # is given the blocks that the load would have written to
    for _ in range(3):
        case.step(4, fails=False)
        case.every_block_is_owned_as_often_as_it_says()
        case.a_hashed_block_keeps_its_content_and_no_packed_block_is_hashed()
    assert case.seen["cancelled load"] == 1
    run_to_the_end(case)
    case.teardown()


def run_to_the_end(case):
    for _ in range(400):
        if not (case.scheduler.has_requests() or case.in_flight):
            return
        case.step(0, fails=False)
    pytest.fail("requests wait for ever")


def test_with_windows_no_block_is_lost_or_read_by_another(windowed_machine):
    """Layers that see a window have groups of their own, whose blocks come out of the same pool."""

    class Roomier(windowed_machine):
        @initialize(asynchronous=st.booleans(), more=st.sampled_from([0, 1]) | st.integers(0, 12))
        def start(self, asynchronous, more):
            # The fewest that vLLM starts with: the longest request's, those of both windows, and the null block.
            in_window = -(-(self.width - 1 + (320 if asynchronous else 160)) // BLOCK) + 1
            super().start(asynchronous, LONGEST // BLOCK + 2 * in_window + 1 + more)

    case = Roomier.TestCase
    case.settings = settings(
        max_examples=60,
        stateful_step_count=70,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    Roomier.seen.clear()
    case("runTest").runTest()
    # There is no store.
    rare = [event for event in EVENTS if not Roomier.seen[event] and event not in OF_STORE]
    assert not rare, f"{rare} never happened, only {dict(Roomier.seen)}"


def test_a_segment_whose_window_was_evicted_is_not_found(windowed_machine):
    """As if it were not there: nobody can go on behind it. Then it is found again, as it was made again."""
    case = windowed_machine()
    case.start(asynchronous=False, blocks=90)

    def found():
        case.arrive(length=400, family=0, shared=380, generate=4, compress=None)
        before = case.seen["found"]
        while case.scheduler.has_requests() or case.in_flight:
            case.step(0, fails=False)
        return case.seen["found"] - before

    assert [found(), found()] == [0, 1]
    (segment,) = case.scheduler._segments.alive()
    assert [len(group) for group in segment.before] == [4, 4]  # a window of 100 tokens sees 99 before it
    case.pool.evict_blocks({segment.before[1][0].block.block_id})
    assert segment.alive and found() == 0
    assert found() == 1
    case.teardown()
