"""Which queries a problem is made of: all sampled ones from the future, the recent ones as they were, too."""

from __future__ import annotations

import torch

from kvsculpt_vllm.sculpt.queries import FUTURE_TOKENS, HELD_OUT_EVERY, build_problems
from kvsculpt_vllm.sculpt.rotary import Rotary

HEAD_SIZE, HEADS, KV_HEADS, SPAN, SINKS, PROMPT, RECENT = 8, 4, 2, 32, 2, 40, 5
FREQUENCIES = 10000.0 ** (-torch.arange(HEAD_SIZE // 2, dtype=torch.float64) / (HEAD_SIZE // 2))


def rotate(x, positions):
    """RoPE by complex numbers: x (..., P, D), halves paired."""
    angles = positions.double()[:, None] * FREQUENCIES
    turns = torch.polar(torch.ones_like(angles), angles)
    turned = torch.complex(*x.double().chunk(2, dim=-1)) * turns
    return torch.cat([turned.real, turned.imag], dim=-1)


def make(num_positions=4096):
    torch.manual_seed(0)
    angles = torch.arange(num_positions).double()[:, None] * FREQUENCIES
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
