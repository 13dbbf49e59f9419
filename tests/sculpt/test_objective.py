"""The loss and its gradient against the formula of one softmax over compressed and retained entries, in float64."""

import dataclasses
import math

import pytest
import torch

from kvsculpt_vllm.sculpt import problem
from kvsculpt_vllm.sculpt.attention import attend, attend_all, merge
from kvsculpt_vllm.sculpt.objective import Target
from kvsculpt_vllm.sculpt.problem import retained_attention

CAP = 1.5  # well below the largest logits


@pytest.fixture(params=[None, CAP], ids=["no cap", "soft cap"])
def compressed(request, make_case):
    """A case with both its targets and some pairs that are off: 9 of 40 entries, displaced."""
    case = make_case(soft_cap=request.param)
    generator = torch.Generator().manual_seed(7)
    keys, values = (x[:, :9] + 0.3 * torch.randn(3, 9, 8, generator=generator).double() for x in case.entries)
    return case, *Target.split(case.problems, *case.teacher()), keys, values


def test_loss_is_the_formula_written_out_per_query(compressed):
    case, train, held_out, keys, values = compressed
    problems = case.problems
    for b in range(3):
        true_out, true_lse = case.attention(problems.keys[b], problems.values[b], b)
        rows = {False: [], True: []}
        for i, query in enumerate(problems.queries[b].tolist()):
            pairs = [(k, v) for ks, vs in [(keys, values), (case.retained_keys, case.retained_values)]
                     for k, v in zip(ks[b].tolist(), vs[b].tolist(), strict=True)]  # fmt: skip
            logits = [problems.scale * sum(x * y for x, y in zip(query, k, strict=True)) for k, _ in pairs]
            if problems.soft_cap is not None:
                logits = [problems.soft_cap * math.tanh(logit / problems.soft_cap) for logit in logits]
            powers = [math.exp(logit) for logit in logits]
            out = [sum(p * v[d] for p, (_, v) in zip(powers, pairs, strict=True)) / sum(powers) for d in range(8)]
            distance = sum((x - y) ** 2 for x, y in zip(out, true_out[i].tolist(), strict=True))
            error = math.log(sum(powers)) - float(true_lse[i])
            rows[bool(problems.held_out[i])].append((distance, error**2))
        norm = float(true_out.square().sum() / len(true_out))
        for target, errors in ((train, rows[False]), (held_out, rows[True])):
            expected = sum(d / norm + e for d, e in errors) / len(errors)
            assert target.loss(keys, values)[b].item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    "case", [{}, {"num_retained": 0}, {"sinks": True}, {"soft_cap": CAP}, {"soft_cap": CAP, "sinks": True}], ids=str
)
def test_gradient_is_that_of_autograd_and_of_finite_differences(make_case, case):
    case = make_case(**case)
    train, _ = Target.split(case.problems, *case.teacher())
    keys, values = (x[:, 3:10].clone() for x in case.entries)
    keys += 0.1
    loss, grad = train.loss_and_grad(keys, values)
    torch.testing.assert_close(loss, train.loss(keys, values), rtol=1e-12, atol=0)
    leaf = keys.clone().requires_grad_()
    naive = torch.stack([case.loss(leaf[b], values[b], b, ~case.problems.held_out) for b in range(3)])
    torch.testing.assert_close(loss, naive.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(naive.sum(), leaf)[0], rtol=1e-9, atol=1e-12)
    for i, d in ((0, 0), (2, 5), (6, 7)):
        step = torch.zeros_like(keys)
        step[:, i, d] = 1e-5
        difference = (train.loss(keys + step, values) - train.loss(keys - step, values)) / 2e-5
        torch.testing.assert_close(grad[:, i, d], difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("padding", [1e4, -1e4])
def test_padding_has_neither_weight_nor_gradient(compressed, padding):
    _, train, _, keys, values = compressed
    valid = torch.arange(9)[None] < torch.tensor([9, 5, 1])[:, None]
    padded_keys, padded_values = (x.masked_fill(~valid[..., None], padding) for x in (keys, values))
    loss, grad = train.loss_and_grad(padded_keys, padded_values, valid)
    assert torch.equal(train.loss(padded_keys, padded_values, valid), loss)
    for b, size in enumerate([9, 5, 1]):
        one = train.take(torch.tensor([b]))
        short_loss, short_grad = one.loss_and_grad(keys[b : b + 1, :size], values[b : b + 1, :size])
        torch.testing.assert_close(loss[b], short_loss[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(grad[b, :size], short_grad[0], rtol=1e-12, atol=1e-15)
        assert (grad[b, size:] == 0).all()


def test_a_query_that_all_kept_entries_miss_costs_much_but_stays_finite(make_case):
    case = make_case(num_retained=0, dtype=torch.float32)
    train, _ = Target.split(case.problems, *(x.float() for x in case.teacher()))
    far = -200 * case.problems.queries.mean(1, keepdim=True)
    loss = train.loss(far, torch.ones_like(far))
    assert loss.isfinite().all() and (loss > 1000).all()


def test_attention_over_two_sets_joins_to_one_softmax(make_case):
    case = make_case()
    keys, values = case.entries
    visible = torch.rand(21, 40, generator=torch.Generator().manual_seed(3)) < 0.5
    visible[4], visible[5, :15], visible[6, 15:] = False, False, False  # nothing, only the right, only the left
    visible[4, 0] = True
    args = case.problems.queries, keys, values, case.problems.scale
    parts = [
        attend(args[0], keys[:, part], values[:, part], args[3], visible[None, :, part])
        for part in (slice(0, 15), slice(15, 40))
    ]
    logits = (args[0] @ keys.transpose(1, 2) * args[3]).masked_fill(~visible, -torch.inf)
    out, lse = merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, torch.softmax(logits, -1) @ values, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, torch.logsumexp(logits, -1), rtol=1e-13, atol=1e-13)
    assert (parts[0][0][:, 5] == 0).all() and (parts[0][1][:, 5] == -torch.inf).all()


@pytest.mark.parametrize("soft_cap", [None, CAP])
@pytest.mark.parametrize("shape", [(1, 1, 8), (700, 33, 96), (5, 2000, 64), (40, 0, 64)], ids=str)
def test_attention_over_all_keys_is_a_softmax_however_it_is_computed(shape, soft_cap):
    num_queries, num_keys, width = shape
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, n, width, generator=generator) for n in (num_queries, num_keys, num_keys))
    logits = (8 * q).double() @ k.double().transpose(1, 2) * 0.2  # sharp: the largest are far from the mean
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    out, lse = attend_all(8 * q, k, v, 0.2, soft_cap)
    torch.testing.assert_close(out.double(), torch.softmax(logits, -1) @ v.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(lse.double(), torch.logsumexp(logits, -1), rtol=1e-5, atol=1e-5)


def test_a_key_that_is_no_number_is_not_hidden_by_any_of_the_ways_to_attend():
    q, k = torch.ones(1, 40, 64), torch.ones(1, 600, 64)
    k[0, 599, 3] = torch.nan
    for out, lse in (attend(q, k, k, 0.1), attend_all(q, k, k, 0.1)):
        assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("part", [1 << 20, 1])  # all queries at once, and one at a time
@pytest.mark.parametrize("num_sinks", [0, 3])
def test_retained_attention_sees_sinks_always_and_recent_entries_causally(num_sinks, part, monkeypatch):
    monkeypatch.setattr(problem, "max_elements", lambda device: part)
    torch.manual_seed(0)
    sinks, recent, queries = torch.randn(2, num_sinks, 4), torch.randn(2, 6, 4), torch.randn(2, 4, 4)
    positions = torch.tensor([5, 12, 14, 99])  # the recent entries are at 10 to 15
    out, lse = retained_attention(queries, positions, sinks, -sinks, recent, -recent, torch.arange(10, 16), 0.5)
    for i, seen in enumerate([0, 3, 5, 6]):
        keys = torch.cat([sinks, recent[:, :seen]], 1).double()
        logits = queries[:, i : i + 1].double() @ keys.transpose(1, 2) * 0.5
        expected = torch.softmax(logits, -1) @ -keys
        torch.testing.assert_close(out[:, i], expected[:, 0].float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[:, i], torch.logsumexp(logits, -1)[:, 0].float(), rtol=1e-5, atol=1e-6)


def test_take_takes_every_tensor(make_case):
    case = make_case()
    part = case.problems.take(torch.tensor([2, 0]))
    for field in dataclasses.fields(part):
        whole, some = getattr(case.problems, field.name), getattr(part, field.name)
        if field.name in ("held_out", "scale", "soft_cap", "group", "recent", "followed"):
            assert some is whole
        elif field.name == "foretell":
            assert some is None
        else:
            assert torch.equal(some, whole[[2, 0]].float())
