"""Mass matching, against SciPy's non-negative least squares in float64."""

import torch
from scipy.optimize import nnls

from kvsculpt_vllm.sculpt.mass import match_mass
from kvsculpt_vllm.sculpt.objective import Target


def squared_mass_error(target, keys):
    """What the non-negative least squares minimise: Σ_q (mass of the keys - mass of the span)² (B,)."""
    return (target.weights(keys, None).sum(-1, keepdim=True) + target.retained_mass - 1).square().sum((1, 2))


def test_matched_keys_come_close_to_scipys_non_negative_least_squares(make_case):
    """With one coordinate of every query equal, a constant logit exists and the bias is exact inside the key."""
    case = make_case(num_queries=210)
    case.problems.queries[..., 0] = 1.0
    for b in range(case.problems.num_problems):  # the retained attention of the changed queries
        nothing = case.problems.keys[b, :0]
        out, lse = case.attention(nothing, nothing, b)
        case.problems.retained_out[b], case.problems.retained_lse[b] = out, lse
    train, _ = Target.split(case.problems, *case.teacher())
    keys = torch.stack([case.problems.keys[b, case.selected(b, 9)] for b in range(case.problems.num_problems)])
    before, after = squared_mass_error(train, keys), squared_mass_error(train, match_mass(train, keys))
    for b in range(case.problems.num_problems):
        _, residual = nnls(train.weights(keys, None)[b].numpy(), (1 - train.retained_mass[b, :, 0]).numpy())
        assert residual**2 <= float(after[b]) * (1 + 1e-9)
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
