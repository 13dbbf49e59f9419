"""Mass matching, against SciPy's non-negative least squares in float64."""

import pytest
import torch
from scipy.optimize import nnls

from kvsculpt_vllm.sculpt.mass import match_mass
from kvsculpt_vllm.sculpt.objective import Target
from kvsculpt_vllm.sculpt.problem import Problems


def squared_mass_error(target, keys):
    """What the non-negative least squares minimise: Σ_q (mass of the keys - mass of the span)² (B,)."""
    return (target.weights(keys, None).sum(-1, keepdim=True) + target.retained_mass - 1).square().sum((1, 2))


@pytest.mark.parametrize("soft_cap", [None, 6.0])
def test_matched_keys_come_close_to_scipys_non_negative_least_squares(make_case, soft_cap):
    """With one coordinate of every query equal, a constant logit exists and the bias is exact inside the key.

    The coordinate is large, so that a bias of 1 is a tenth of what keys differ by, as in a model's heads. Under a cap,
    here of two thirds of the largest logits, the bias is right for those that look at the key, nearly.
    """
    case = make_case(num_queries=210, soft_cap=soft_cap)
    case.problems.queries[..., 0] = 10.0
    case.problems.keys[..., 0] = 0.0
    for b in range(case.problems.num_problems):  # the retained attention of the changed queries
        nothing = case.problems.keys[b, :0]
        out, lse = case.attention(nothing, nothing, b)
        case.problems.retained_out[b], case.problems.retained_lse[b] = out, lse
    train, _ = Target.split(case.problems, *case.teacher())
    keys = torch.stack([case.problems.keys[b, case.selected(b, 9)] for b in range(case.problems.num_problems)])
    before, after = squared_mass_error(train, keys), squared_mass_error(train, match_mass(train, keys))
    for b in range(case.problems.num_problems):
        _, residual = nnls(train.weights(keys, None)[b].numpy(), (1 - train.retained_mass[b, :, 0]).numpy())
        # No bound under a cap: a key's logits do not all move by the same there.
        assert soft_cap is not None or residual**2 <= float(after[b]) * (1 + 1e-9)
        assert float(before[b] - after[b]) > 0.8 * (float(before[b]) - residual**2)


def test_padding_and_unseen_entries_stay_where_they_are(make_case):
    case = make_case()
    train, _ = Target.split(case.problems, *case.teacher())
    keys = case.problems.keys[:, :9].clone()
    keys[:, 8] = -1e4 * train.scaled_queries.mean(1)  # far from every query
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 5:] = False
    matched = match_mass(train, keys, valid)
    assert matched.isfinite().all()
    torch.testing.assert_close(matched[1, 5:], keys[1, 5:], rtol=0, atol=0)
    alone = match_mass(train.take(torch.tensor([1])), keys[1:2, :5])
    torch.testing.assert_close(matched[1, :5], alone[0])


def test_mass_is_not_matched_along_a_direction_in_which_only_the_given_queries_are_alike():
    """Queries nearly equal and short, keys that other queries tell apart, by the formula in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys, values = 4 * normal(2, 1, 16) + 0.5 * normal(2, 200, 16), normal(2, 200, 16)
    queries = 0.005 * (normal(2, 1, 16) + 0.003 * normal(2, 70, 16))
    nothing, held_out = torch.full((2, 70), -torch.inf, dtype=torch.float64), torch.arange(70) % 7 == 6
    problems = Problems(queries, keys, values, nothing, torch.zeros_like(queries), held_out, 1.0)
    logits = queries @ keys.transpose(1, 2)
    train, _ = Target.split(problems, logits.softmax(-1) @ values, logits.logsumexp(-1))
    foreign = normal(2, 300, 16)

    def squared_error(kept, asked):
        return ((asked @ kept.transpose(1, 2)).logsumexp(-1) - (asked @ keys.transpose(1, 2)).logsumexp(-1)).square()

    kept = keys[:, :60]
    matched = match_mass(train, kept)
    assert (squared_error(matched, queries).mean(1) < squared_error(kept, queries).mean(1)).all()
    assert (squared_error(matched, foreign).mean(1) < 1.5 * squared_error(kept, foreign).mean(1)).all()
