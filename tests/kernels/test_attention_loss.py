"""The loss kernel against its twin in float64 and against autograd of the formula."""

import pytest
import torch

from kvsculpt_vllm.kernels.attention_loss import attention_loss, attention_loss_twin

CASES = [
    (2, 63, 111, 64, [111, 40]),  # odd sizes, ragged
    (1, 1, 1, 64, [1]),
    (3, 70, 65, 96, [65, 1, 33]),
    (2, 33, 40, 128, [40, 32]),
    (1, 40, 33, 256, [33]),
]


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_are_those_of_the_formula(case, soft_cap, make_problem, device):
    arguments, sizes = make_problem(*case)
    wanted_loss, wanted_grad = attention_loss_twin(*arguments, sizes, 0.7, soft_cap)
    single = [tensor.float() for tensor in arguments]
    for tensor, size in zip(single[6:], (sizes, sizes), strict=True):  # padding may hold anything
        for b, count in enumerate(size.tolist()):
            tensor[b, count:] = torch.nan
    loss, grad = attention_loss(*single, sizes, 0.7, soft_cap=soft_cap)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-3, atol=1e-6)
    scale = wanted_grad.abs().max()
    # A single entry answers nearly all by itself: its gradient is a small difference of products that a GPU rounds.
    atol = 1e-2 if sizes.tolist() == [1] else 2e-3
    torch.testing.assert_close(grad.double() / scale, wanted_grad / scale, rtol=0, atol=atol)
    again = attention_loss(*single, sizes, 0.7, soft_cap=soft_cap)
    assert torch.equal(loss, again[0]) and torch.equal(grad, again[1])
    only_loss, nothing = attention_loss(*single, sizes, 0.7, with_grad=False, soft_cap=soft_cap)
    assert torch.equal(only_loss, loss) and nothing is None


@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_the_twin_is_what_autograd_says(soft_cap, make_problem):
    (*rest, keys, values), sizes = make_problem(2, 20, 9, 16, [9, 5], device="cpu")
    keys.requires_grad_()
    queries, shift, out, retained_mass, retained_sum, out_norm = rest
    total = 0
    for b, size in enumerate(sizes.tolist()):
        logits = queries[b] @ keys[b, :size].T
        logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
        weights = (logits - shift[b, :, None]).exp()
        mass = weights.sum(1) + retained_mass[b]
        given = (weights @ values[b, :size] + retained_sum[b]) / mass[:, None]
        loss = (given - out[b]).square().sum(1).mean() / out_norm[b] + 0.7 * mass.log().square().mean()
        torch.testing.assert_close(attention_loss_twin(*rest, keys, values, sizes, 0.7, soft_cap)[0][b], loss)
        total = total + loss
    (wanted,) = torch.autograd.grad(total, keys)
    torch.testing.assert_close(attention_loss_twin(*rest, keys, values, sizes, 0.7, soft_cap)[1], wanted)


def test_strided_tensors_are_read_where_they_are(make_problem, device):
    arguments, sizes = make_problem(2, 24, 20, 64, [20, 11])
    single = [tensor.float() for tensor in arguments]
    apart = []
    for tensor in single:
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] * 3), torch.nan, device=device)
        part = wide[..., tensor.shape[-1] : 2 * tensor.shape[-1]]
        apart.append(part.copy_(tensor) if tensor.dim() > 1 else tensor)
    for mine, theirs in zip(attention_loss(*single, sizes), attention_loss(*apart, sizes), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x.double(), r"queries: dtype torch.float64 given"),
        (1, lambda x: x[:, 1:], r"shift: shape \(2, 23\) given, expected \(2, 24\)"),
        (7, lambda x: x[..., :32], r"values: shape \(2, 20, 32\) given"),
    ],
)
def test_what_does_not_fit_is_named(index, change, message, make_problem):
    arguments, sizes = make_problem(2, 24, 20, 64, [20, 11])
    single = [tensor.float() for tensor in arguments]
    single[index] = change(single[index])
    with pytest.raises(ValueError, match=message):
        attention_loss(*single, sizes)
