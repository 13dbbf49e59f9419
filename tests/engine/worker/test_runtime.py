"""How long a compression holds up a step, on a clock that the test moves."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.commands import CancelCommand, Pace, SolveCommand, attach
from kvsculpt_vllm.engine.worker import runtime
from kvsculpt_vllm.engine.worker.runtime import ALONE_MS, Runtime

SLICE = 0.125  # seconds, exact in binary
COMMAND = SolveCommand("r", 0, 600, 0, 512, 64, exact=[1, 2], earlier=[], packed=[3], blocks_held=2)


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class State:
    """What `Runtime` needs of `CompressionState`."""

    block_bytes = 1

    def __init__(self, **settings) -> None:
        self.config = CompressionConfig(method="sculpt", **settings)
        self.unsolved = []

    def begin_step(self, output) -> None: ...

    def unsolve(self, request_id) -> None:
        self.unsolved.append(request_id)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(runtime, "time", clock)
    return clock


@dataclass
class Device:
    """Computes slices behind the host's back; who waits for it moves the clock."""

    clock: Clock
    slice_seconds: float
    busy_until: float = 0.0
    waits: int = 0

    def launch(self) -> None:
        self.busy_until = max(self.busy_until, self.clock.now) + self.slice_seconds

    def wait(self) -> None:
        self.waits += 1
        self.clock.now = max(self.clock.now, self.busy_until)


def make_on_device(device: Device, **settings) -> Runtime:
    """A runtime whose solves never end and cost the host nothing."""

    def solve(command, fallback):
        while True:
            device.launch()
            yield

    ranks = SimpleNamespace(gather=lambda value: [[value]])
    return Runtime(State(**settings), SimpleNamespace(solve=solve), ranks, None, device.wait)


def test_a_device_is_waited_for_seldom_and_is_done_at_the_deadline(clock):
    device = Device(clock, slice_seconds=2**-10)
    working = make_on_device(device, max_stall_ms=250)
    output = SimpleNamespace(finished_req_ids=set(), preempted_req_ids=None)
    for number in range(3):
        begin, device.waits = clock.now, 0
        attach(output, [COMMAND] if number == 0 else [])
        working.before_step(output)
        assert device.busy_until == clock.now  # nothing is left that the step would have to wait for
        assert 0.25 <= clock.now - begin <= 0.25 + device.slice_seconds
        assert device.waits <= 10  # of 256 slices
    # Slices that suddenly take twice as long are no surprise.
    device.slice_seconds *= 2
    begin = clock.now
    working.before_step(output)
    assert 0.25 <= clock.now - begin <= 0.25 + device.slice_seconds


def make(clock: Clock, **settings) -> Runtime:
    """A runtime whose solves never end; a slice takes `SLICE`."""

    def solve(command, fallback):
        while True:
            clock.now += SLICE
            yield

    ranks = SimpleNamespace(gather=lambda value: [[value]])
    return Runtime(State(**settings), SimpleNamespace(solve=solve), ranks, None, lambda: None)


def slices_of_a_step(clock: Clock, runtime: Runtime, *messages, finished=()) -> int:
    output = SimpleNamespace(finished_req_ids=set(finished), preempted_req_ids=None)
    attach(output, list(messages))
    before = clock.now
    runtime.before_step(output)
    return round((clock.now - before) / SLICE)


def test_a_slice_is_short_while_others_run_or_wait_and_long_while_nobody_does(clock):
    working = make(clock, max_stall_ms=250)
    assert slices_of_a_step(clock, working, COMMAND, Pace(alone=True)) == ALONE_MS / 1000 / SLICE
    assert slices_of_a_step(clock, working, Pace(alone=True)) == ALONE_MS / 1000 / SLICE
    # Somebody came: from the next step on.
    assert slices_of_a_step(clock, working, Pace(alone=False)) == 2
    assert slices_of_a_step(clock, working, Pace(alone=False)) == 2
    assert slices_of_a_step(clock, working, Pace(alone=True)) == ALONE_MS / 1000 / SLICE


def test_a_server_that_allows_more_gets_more(clock):
    working = make(clock, max_stall_ms=2000)
    assert slices_of_a_step(clock, working, COMMAND, Pace(alone=True)) == 16
    assert slices_of_a_step(clock, working, Pace(alone=False)) == 16


def test_after_an_abort_nothing_more_is_done(clock):
    working = make(clock)
    assert slices_of_a_step(clock, working, COMMAND, Pace(alone=True)) > 0
    assert slices_of_a_step(clock, working, finished=["other"]) > 0
    assert slices_of_a_step(clock, working, finished=["r"]) == 0
    assert slices_of_a_step(clock, working) == 0


def test_after_a_cancel_nothing_more_is_done_and_what_was_solved_is_forgotten(clock):
    working = make(clock)
    assert slices_of_a_step(clock, working, COMMAND, Pace(alone=True)) > 0
    assert slices_of_a_step(clock, working, CancelCommand("r")) == 0
    assert working.state.unsolved == ["r"]
    # It may begin anew.
    assert slices_of_a_step(clock, working, COMMAND, Pace(alone=True)) > 0
