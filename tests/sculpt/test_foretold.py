"""Queries of a second reading, foretold; and the order that they and the prompt's own queries give together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.foretold import FOUND_IN, SHARPLY, QueryMaps, interleaved
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.problem import Earlier
from kvsculpt_vllm.sculpt.queries import REQUEST_TOKENS, build_problems
from kvsculpt_vllm.sculpt.rotary import Rotary
from kvsculpt_vllm.sculpt.slices import finish
from kvsculpt_vllm.sculpt.survey import survey
from rope import frequencies, rotate

SIZE, LAYERS, HEADS, GROUP, SINKS, SPAN, TOKENS, FIRST, RECENT, SCALE = 8, 3, 2, 2, 2, 32, 40, 24, 5, 0.7
PLAN = PagePlan(8, SPAN // 8, 2 * LAYERS * HEADS, SINKS)
EFFORT = Effort(positions=TOKENS, pilot_positions=20, fit_positions=40, key_steps=0)
MAPPED = (1, 2, 5)  # KV heads; those of the second layer, 2 and 3, do not rotate


@given(st.permutations(range(13)), st.permutations(range(13)), st.integers(0, 13))
def test_the_second_order_has_as_many_of_the_first_ones_as_are_wanted_behind_the_first(first, second, allowed):
    """By hand: three by the first order, three by the second, then in turn, until the second has had its own."""
    wanted = allowed / FOUND_IN / 13 + 1e-9
    order = interleaved(torch.tensor([first, first[::-1]]), torch.tensor([second, second]), [wanted, wanted])
    for mixed, own in zip(order.tolist(), (first, first[::-1]), strict=True):
        places = own[:3] + second[: min(3, allowed)]
        for place in range(3, 13):
            places += own[place : place + 1] + second[place : min(place + 1, allowed)]
        assert mixed == list(dict.fromkeys(places))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROTATES = (True, False, True)
POSITIONS = torch.tensor([0, 3, 10, 17, 21, 22, 30, *range(TOKENS - RECENT, TOKENS)]) + FIRST
CONTENT = normal(LAYERS, HEADS * GROUP, len(POSITIONS), SIZE, seed=1)  # queries before any rotation
KEYS, VALUES = normal(2, LAYERS * HEADS, TOKENS, SIZE, seed=2)
EARLIER = [normal(3 + b, SIZE, seed=10 + b) for b in range(LAYERS * HEADS)]
MAPS = normal(len(MAPPED), GROUP, SIZE + 1, SIZE, seed=3)
WANTED = (0.3, 0.5, 0.2)


def make(num_positions=4096, **kwargs):
    angles = torch.arange(num_positions).double()[:, None] * frequencies(SIZE)
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=-1), SIZE, is_neox_style=True)
    asked = [rotate(plain, POSITIONS) if turns else plain for plain, turns in zip(CONTENT, ROTATES, strict=True)]
    return build_problems(
        torch.stack([layer.float() for layer in asked]).transpose(1, 2),
        POSITIONS,
        RECENT,
        KEYS,
        VALUES,
        SPAN,
        SINKS,
        [rotary if turns else None for turns in ROTATES],
        SCALE,
        first=FIRST,
        earlier=Earlier(EARLIER, EARLIER),
        **kwargs,
    )


def wanted(number, last=4095):
    """A head's foretold queries (P, G, D), by the formula."""
    layer, group = number // HEADS, slice(number % HEADS * GROUP, (number % HEADS + 1) * GROUP)
    maps = MAPS[MAPPED.index(number)].double()
    foretold = torch.stack(
        [plain.double() @ own[:-1] + own[-1] for plain, own in zip(CONTENT[layer, group], maps, strict=True)]
    )
    again = (FIRST + TOKENS + REQUEST_TOKENS + POSITIONS - FIRST).clamp_max(last)
    return (rotate(foretold, again) if ROTATES[layer] else foretold).transpose(0, 1)


@pytest.mark.parametrize("positions", [4096, FIRST + TOKENS + 20], ids=["", "at the model's last position"])
def test_they_are_mapped_where_they_have_no_position_and_ask_from_behind(positions):
    problems = finish(make(positions).foretell(QueryMaps(MAPPED, MAPS, WANTED)))
    for row, number in enumerate(MAPPED):
        queries = wanted(number, positions - 1).flatten(0, 1)
        torch.testing.assert_close(problems.queries[row].double(), queries, rtol=0, atol=1e-4)
        # They see the sinks, the whole window and what is left of earlier segments.
        seen = torch.cat([KEYS[number, :SINKS], KEYS[number, SPAN:], EARLIER[number]]).double()
        lse = (queries @ seen.T * SCALE).logsumexp(-1)
        torch.testing.assert_close(problems.retained_lse[row].double(), lse, rtol=1e-5, atol=1e-4)
        assert torch.equal(problems.keys[row], KEYS[number, SINKS:SPAN])


def test_of_some_problems_the_same_are_built():
    maps = QueryMaps(MAPPED, MAPS, WANTED)
    whole = finish(make().foretell(maps))
    part = finish(make(numbers=range(2, 6)).foretell(maps.part(slice(2, 6))))
    assert torch.equal(part.queries, whole.queries[1:]) and torch.equal(part.retained_lse, whole.retained_lse[1:])
    assert maps.part(slice(2, 6)).heads == (0, 3) and maps.part(slice(2, 6)).wanted == WANTED[1:]


def curves(maps):
    return LossCurves((0.25, 1.0), torch.ones(LAYERS * HEADS, 2).numpy(), power=2, query_maps=maps)


def test_heads_with_maps_keep_what_a_second_reading_would_look_at_sharply_too():
    problems = make()
    plain = survey(problems, PLAN, "sculpt", "adaptive", EFFORT, calibration=curves(None)).ranking.order
    mixed = survey(problems, PLAN, "sculpt", "adaptive", EFFORT, calibration=curves(QueryMaps(MAPPED, MAPS, WANTED)))
    for number in range(LAYERS * HEADS):
        expected = plain[number]
        if number in MAPPED:
            keys = torch.cat([KEYS[number, SINKS:SPAN], KEYS[number, :SINKS], KEYS[number, SPAN:], EARLIER[number]])
            shares = (wanted(number).flatten(0, 1) @ keys.double().T * SCALE).softmax(-1)[:, : SPAN - SINKS]
            second = shares.pow(SHARPLY).sum(0).argsort(descending=True)
            expected = interleaved(expected[None], second[None], [WANTED[MAPPED.index(number)]])[0]
            assert not torch.equal(expected, plain[number])
        assert torch.equal(mixed.ranking.order[number], expected)


def test_problems_that_do_not_know_what_was_asked_first_are_refused():
    some = make().take(slice(None))
    with pytest.raises(ValueError, match="not known what was asked in the first reading"):
        survey(some, PLAN, "sculpt", "adaptive", EFFORT, calibration=curves(QueryMaps(MAPPED, MAPS, WANTED)))
    nobody = curves(QueryMaps((), MAPS[:0], ()))
    mixed = survey(make(), PLAN, "sculpt", "adaptive", EFFORT, calibration=nobody).ranking.order
    assert torch.equal(
        mixed, survey(make(), PLAN, "sculpt", "adaptive", EFFORT, calibration=curves(None)).ranking.order
    )
    assert nobody.part(slice(0, 3)).query_maps.heads == ()
