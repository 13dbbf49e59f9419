"""What differs between the versions of vLLM's scheduler is the same to ours: doubles do as their sources do."""

from types import SimpleNamespace

import pytest
from vllm.outputs import RequestError
from vllm.v1.request import RequestStatus

from kvsculpt_vllm.engine.compat.scheduler import NO_ROOM, SchedulerHooks


class Stock:
    """The loop over waiting requests: 0.32 stops at one that cannot begin, 0.33 passes it over."""

    stops = True

    def schedule(self):
        begun = []
        for request in self.waiting:
            if not self._handle_blocked_waiting_request(request):
                continue
            if self._reserve_prefill_lookahead(request, 0, request.tokens) == 0:
                if self.stops:
                    break
                continue
            begun.append(request.name)
        return begun

    def _handle_blocked_waiting_request(self, request):
        return True

    def _reserve_prefill_lookahead(self, request, num_computed_tokens, num_new_tokens):
        return num_new_tokens


class Ours(SchedulerHooks, Stock):
    """Has room for so many tokens in a step, for a request."""

    def __init__(self, stops, room, *tokens):
        self.stops, self.room = stops, room
        self.waiting = [
            SimpleNamespace(name=f"r{i}", tokens=n, status=RequestStatus.WAITING) for i, n in enumerate(tokens)
        ]

    def is_awaited(self, request):
        return request.tokens == 3

    def limit_chunk(self, request, first, num_tokens):
        return num_tokens if num_tokens <= self.room else 0


@pytest.mark.parametrize("stops", [True, False], ids=["0.32", "0.33"])
def test_nobody_overtakes_a_prompt_that_waits_for_room(stops):
    scheduler = Ours(stops, 10, 5, 3, 4, 20, 6)
    assert scheduler.schedule() == ["r0", "r2"]  # r1 waits for the store, which holds up nobody
    scheduler.room = 20
    assert scheduler.schedule() == ["r0", "r2", "r3", "r4"]  # each step begins anew


def test_what_vllm_itself_cannot_begin_holds_up_nobody():
    scheduler = Ours(False, 10, 5, 0, 6)
    assert scheduler.schedule() == ["r0", "r2"]


def test_a_running_prompt_that_waits_for_room_holds_up_nobody():
    scheduler = Ours(False, 10, 20, 6)
    scheduler.waiting[0].status = RequestStatus.RUNNING
    assert scheduler.schedule() == ["r1"]


@pytest.mark.parametrize(
    ("errors", "told"),
    [(set(), {"r0"}), ({}, {"r0": RequestError(code="kv_compression", message=NO_ROOM)})],
    ids=["0.32", "0.33"],
)
def test_a_request_is_ended_with_an_error(errors, told):
    scheduler = Ours(True, 10)
    scheduler.grammar_compile_error_reqs = errors
    scheduler.end_with_error(SimpleNamespace(request_id="r0"))
    assert errors == told
