"""Which queries a problem is made of: all sampled ones from the future, the recent ones as they were, too."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvsculpt_vllm.sculpt import problem
from kvsculpt_vllm.sculpt.problem import Earlier
from kvsculpt_vllm.sculpt.queries import FUTURE_TOKENS, HELD_OUT_EVERY, build_problems, future_positions
from kvsculpt_vllm.sculpt.rotary import Rotary
from rope import frequencies, rotate

HEAD_SIZE, HEADS, KV_HEADS, SPAN, SINKS, PROMPT, RECENT = 8, 4, 2, 32, 2, 40, 5


def make(num_positions=4096):
    torch.manual_seed(0)
    angles = torch.arange(num_positions).double()[:, None] * frequencies(HEAD_SIZE)
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=-1), HEAD_SIZE, is_neox_style=True)
    positions = torch.tensor([0, 3, 10, 17, 21, 22, 30, *range(PROMPT - RECENT, PROMPT)])
    content = torch.randn(HEADS, len(positions), HEAD_SIZE)  # before any rotation
    asked = rotate(content, positions).transpose(0, 1)[None]  # (1, P, heads, D)
    keys, values = torch.randn(2, KV_HEADS, PROMPT, HEAD_SIZE)
    problems = build_problems(asked.float(), positions, RECENT, keys, values, SPAN, SINKS, [rotary], 0.3)
    return content, positions, problems


def test_every_sampled_query_asks_from_the_future_and_recent_ones_also_as_they_were():
    content, positions, problems = make()
    rows = problems.queries.unflatten(1, (-1, HEADS // KV_HEADS))  # (KV heads, P + recent, group, D)
    assert rows.shape[1] == len(positions) + RECENT and problems.recent == RECENT
    for head in range(HEADS):
        mine = rows[head // 2, :, head % 2].double()
        torch.testing.assert_close(
            mine[len(positions) :], rotate(content[head, -RECENT:], positions[-RECENT:]), rtol=0, atol=1e-4
        )
        for row, plain in zip(mine, content[head], strict=False):
            # From some position after the prompt, at most FUTURE_TOKENS on.
            everywhere = rotate(plain.expand(FUTURE_TOKENS, -1), torch.arange(PROMPT, PROMPT + FUTURE_TOKENS))
            assert (everywhere - row).abs().amax(1).min() < 1e-3


def test_a_segment_that_others_follow_is_asked_from_afar_as_far_as_the_model_goes():
    near = future_positions(torch.arange(FUTURE_TOKENS), PROMPT, PROMPT + 100 * FUTURE_TOKENS) - PROMPT
    assert (near.min(), near.max()) == (0, FUTURE_TOKENS - 1)
    room = 100 * FUTURE_TOKENS
    distances = future_positions(torch.arange(FUTURE_TOKENS), PROMPT, PROMPT + room, followed=True) - PROMPT
    assert distances.min() == FUTURE_TOKENS and 0.98 * room < distances.max() < room
    assert (distances < 10 * FUTURE_TOKENS).float().mean() == pytest.approx(1 / 2, abs=0.01)  # log-uniform


def test_a_segment_near_the_model_s_last_position_is_asked_from_the_farther_half_of_what_is_left():
    for room in (2, 10, FUTURE_TOKENS):
        distances = future_positions(torch.arange(FUTURE_TOKENS), PROMPT, PROMPT + room, followed=True) - PROMPT
        assert (distances.min(), distances.max()) == (room // 2, room - 1)
    assert (future_positions(torch.arange(FUTURE_TOKENS), PROMPT, PROMPT, followed=True) == PROMPT - 1).all()


def test_queries_spread_over_what_the_model_has_left():
    positions = future_positions(torch.arange(FUTURE_TOKENS), PROMPT, PROMPT + 64)
    assert positions.bincount().tolist() == PROMPT * [0] + 64 * [FUTURE_TOKENS // 64]


def test_no_query_asks_from_beyond_the_model_s_positions():
    content, positions, problems = make(num_positions=PROMPT + 3)
    rows = problems.queries.unflatten(1, (-1, HEADS // KV_HEADS))[0, : len(positions), 0].double()
    for row, plain in zip(rows, content[0], strict=True):
        last = rotate(plain.expand(3, -1), torch.arange(PROMPT, PROMPT + 3))
        assert (last - row).abs().amax(1).min() < 1e-3


def test_a_query_that_is_asked_twice_is_held_out_twice_or_not_at_all():
    _, positions, problems = make()
    held_out = problems.held_out.view(-1, problems.group)[:, 0]
    assert held_out[: len(positions)].sum() == len(positions) // HELD_OUT_EVERY
    assert torch.equal(held_out[len(positions) :], held_out[len(positions) - RECENT : len(positions)])
    assert (problems.held_out.view(-1, problems.group) == held_out[:, None]).all()


def test_queries_without_rotary_embedding_ask_from_the_future_as_they_are_and_none_is_held_out_that_is_fitted_to():
    torch.manual_seed(0)
    positions = torch.tensor([0, 3, 10, 17, 21, 22, 30, *range(PROMPT - RECENT, PROMPT)])
    asked = torch.randn(1, len(positions), HEADS, HEAD_SIZE)
    keys, values = torch.randn(2, KV_HEADS, PROMPT, HEAD_SIZE)
    problems = build_problems(asked, positions, RECENT, keys, values, SPAN, SINKS, [None], 0.3)
    rows = (
        problems.queries.unflatten(1, (-1, HEADS // KV_HEADS)).transpose(1, 2).flatten(0, 1)
    )  # (heads, P + recent, D)
    expected = asked[0].transpose(0, 1)
    assert torch.equal(rows, torch.cat([expected, expected[:, -RECENT:]], dim=1))

    # From the future a query sees all of the recent window, where it was asked what lies before it.
    near = torch.cat([torch.arange(SINKS), torch.arange(SPAN, PROMPT)])
    seen = near < torch.cat([torch.full((len(positions),), PROMPT), positions[-RECENT:] + 1])[:, None]
    scores = (rows @ keys.repeat_interleave(HEADS // KV_HEADS, 0)[:, near].mT * 0.3).masked_fill(~seen, -torch.inf)
    lse = problems.retained_lse.unflatten(1, (-1, HEADS // KV_HEADS)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)

    held_out = problems.held_out.view(-1, problems.group)[:, 0]
    for head in rows:
        assert torch.cdist(head[held_out], head[~held_out]).min() > 1e-3


LAYERS, FIRST = 3, 23
LEARNED = torch.linspace(-3.0, 4.0, LAYERS * HEADS).view(LAYERS, HEADS)[:, torch.tensor([2, 0, 3, 1])]
LEARNED[1] = -torch.inf  # of a layer that has none


def segment(**changed):
    """A segment's arguments, some of them `changed`, and its problems; some heads have no earlier entries."""
    torch.manual_seed(0)
    positions = FIRST + torch.tensor([0, 3, 17, 22, *range(PROMPT - RECENT, PROMPT)])
    keys, values = torch.randn(2, LAYERS * KV_HEADS, PROMPT, HEAD_SIZE).bfloat16()
    entries = [torch.randn(2, m, HEAD_SIZE).bfloat16() for m in (7, 0, 1, 30, 0, 12)]
    given = {
        "queries": torch.randn(LAYERS, len(positions), HEADS, HEAD_SIZE).bfloat16(),
        "positions": positions,
        "recent": RECENT,
        "keys": keys,
        "values": values,
        "span": PROMPT - 3,
        "sinks": 0,
        "rotaries": [None] * LAYERS,
        "scale": 0.7,
        "first": FIRST,
        "earlier": Earlier(*zip(*entries, strict=True)),
    } | changed
    return given, build_problems(**given)


def same(one, other):
    """Whether two problems agree bitwise in every field that is a value."""
    values = [field.name for field in dataclasses.fields(one) if field.compare]
    pairs = [(getattr(one, name), getattr(other, name)) for name in values]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("part", [1 << 20, 50])  # all queries at once, and few at a time
@pytest.mark.parametrize("sinks", [0, SINKS])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(
    ("learned", "soft_cap"),
    [(None, None), (LEARNED, None), (LEARNED, 1.5)],
    ids=["plain", "learned sinks", "with a cap"],
)
def test_every_query_sees_what_earlier_segments_left(learned, soft_cap, window, sinks, part, monkeypatch):
    monkeypatch.setattr(problem, "max_elements", lambda device: part)
    given, problems = segment(sinks=sinks, span=PROMPT - window, sink_logits=learned, soft_cap=soft_cap)
    assert problems.soft_cap == soft_cap
    asked_at = torch.cat([torch.full((len(given["positions"]),), FIRST + PROMPT), given["positions"][-RECENT:]])
    recent = torch.arange(PROMPT - window, PROMPT)
    for b, (kept_keys, kept_values) in enumerate(zip(given["earlier"].keys, given["earlier"].values, strict=True)):
        keys = torch.cat([given["keys"][b, :sinks], kept_keys, given["keys"][b, recent]]).double()
        values = torch.cat([given["values"][b, :sinks], kept_values, given["values"][b, recent]]).double()
        causal = asked_at.repeat_interleave(problems.group)[:, None] >= FIRST + recent
        seen = torch.cat([torch.ones(len(causal), sinks + len(kept_keys), dtype=torch.bool), causal], dim=1)
        scores = problems.queries[b].double() @ keys.T * given["scale"]
        scores = scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if learned is not None:
            of_heads = learned[b // KV_HEADS].view(KV_HEADS, -1)[b % KV_HEADS].repeat(len(asked_at))
            scores = torch.cat([scores, of_heads[:, None].double()], dim=1)
            values = torch.cat([values, torch.zeros(1, HEAD_SIZE)])
        # A softmax over nothing is NaN; the problem says 0.
        expected = torch.softmax(scores, -1).nan_to_num(0.0) @ values
        torch.testing.assert_close(problems.retained_out[b].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(problems.retained_lse[b].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    blind = problems.retained_lse == -torch.inf
    assert bool(blind.any()) == (sinks == 0 and learned is None)
    assert (problems.retained_out[blind] == 0).all()


def test_problems_depend_on_distances_not_on_where_a_segment_begins():
    angles = torch.arange(1024).double()[:, None] * frequencies(HEAD_SIZE)
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=-1), HEAD_SIZE, is_neox_style=True)
    found = []
    for first in (0, FIRST):
        torch.manual_seed(0)
        positions = first + torch.tensor([0, 3, 17, 22, *range(PROMPT - RECENT, PROMPT)])
        content, kept = torch.randn(HEADS, len(positions), HEAD_SIZE), torch.randn(KV_HEADS, PROMPT, HEAD_SIZE)
        asked = rotate(content, positions).transpose(0, 1)[None].float()
        keys = rotate(kept, torch.arange(first, first + PROMPT)).float()
        found.append(build_problems(asked, positions, RECENT, keys, kept, SPAN, SINKS, [rotary], 0.3, first=first))
    begin, later = found
    torch.testing.assert_close(later.retained_lse, begin.retained_lse, rtol=0, atol=1e-4)
    torch.testing.assert_close(later.retained_out, begin.retained_out, rtol=0, atol=1e-4)
    logits = [problems.queries @ problems.keys.mT * problems.scale for problems in found]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)


def test_without_rotary_embedding_a_segment_without_others_before_it_is_a_prompt_of_its_own():
    given, problems = segment(earlier=None)
    alone = segment(earlier=None, first=0, positions=given["positions"] - FIRST)[1]
    assert same(problems, alone)
    none_kept = Earlier(
        [torch.empty(0, HEAD_SIZE)] * len(given["keys"]), [torch.empty(0, HEAD_SIZE)] * len(given["keys"])
    )
    assert same(problems, segment(earlier=none_kept)[1])


@pytest.mark.parametrize("numbers", [range(0, 2), range(2, 6), range(0, 6), [1, 2, 5]])
def test_some_of_the_problems_are_those_of_the_whole_and_nothing_else_is_read(numbers):
    given, whole = segment(sink_logits=LEARNED, soft_cap=1.5)
    own = torch.tensor(numbers)
    by_problem = given["queries"].unflatten(2, (KV_HEADS, -1)).transpose(1, 2).flatten(0, 1)
    others = [b for b in range(len(by_problem)) if b not in numbers]
    by_problem[others] = torch.nan
    given["queries"] = by_problem.unflatten(0, (LAYERS, KV_HEADS)).transpose(1, 2).flatten(2, 3)
    for name in ("keys", "values"):
        poisoned = torch.full_like(given[name], torch.nan)
        poisoned[own] = given[name][own]
        given[name] = poisoned
    given["earlier"] = Earlier(
        *(
            [x if b in own else x * torch.nan for b, x in enumerate(xs)]
            for xs in (given["earlier"].keys, given["earlier"].values)
        )
    )
    assert same(build_problems(**given, numbers=numbers).take(torch.arange(len(own))), whole.take(own))


def test_layers_may_rotate_differently():
    angles = torch.arange(1024).double()[:, None] * frequencies(HEAD_SIZE)
    near, far = (
        Rotary(torch.cat([(angles * f).cos(), (angles * f).sin()], dim=-1), HEAD_SIZE, is_neox_style=True)
        for f in (1.0, 0.1)
    )
    given, mixed = segment(rotaries=[near, None, far])
    for layer, rotary in enumerate(given["rotaries"]):
        _, alone = segment(rotaries=[rotary] * LAYERS)
        own = torch.arange(layer * KV_HEADS, (layer + 1) * KV_HEADS)
        if rotary is None:  # and asks from a place that is not near the end of its own positions
            assert torch.equal(mixed.queries[own], alone.queries[own])
        else:
            assert same(mixed.take(own), alone.take(own))


@pytest.mark.parametrize("numbers", [[], [0, 0], [2, 1], [5, 6], [-1, 0]])
def test_numbers_that_are_no_problems_of_the_model_s_are_refused(numbers):
    with pytest.raises(ValueError, match="not ascending numbers of problems"):
        segment(numbers=numbers)


def test_earlier_entries_and_learned_sinks_of_fewer_heads_are_refused():
    with pytest.raises(ValueError, match="5 and 5 problems"):
        segment(earlier=segment()[0]["earlier"].part(range(5)))
    with pytest.raises(ValueError, match=r"sink_logits: shape \(3, 3\) given, expected \(3, 4\)"):
        segment(sink_logits=LEARNED[:, :3])
