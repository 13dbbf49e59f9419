"""Batched L-BFGS against torch.optim.LBFGS, and what a batch adds: problems that fail, stop and change alone."""

import pytest
import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.lbfgs import BatchedLBFGS


class Quadratics:
    """Convex quadratics ½ xᵀAx - bᵀx, one a problem, with condition numbers from 2 to `condition`."""

    def __init__(self, batch: int, size: int, condition: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        basis, _ = torch.linalg.qr(torch.randn(batch, size, size, generator=generator, dtype=torch.float64))
        worst = 2 * (condition / 2) ** torch.linspace(0, 1, batch, dtype=torch.float64)
        spectrum = worst[:, None] ** torch.linspace(-1, 0, size, dtype=torch.float64)
        self.a = basis @ torch.diag_embed(spectrum) @ basis.transpose(1, 2)
        self.b = torch.randn(batch, size, generator=generator, dtype=torch.float64)
        self.start = torch.randn(batch, size, generator=generator, dtype=torch.float64)

    def take(self, index: list[int]) -> "Quadratics":
        part = object.__new__(Quadratics)
        part.a, part.b, part.start = self.a[index], self.b[index], self.start[index]
        return part

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product = (self.a @ x[..., None])[..., 0]
        return (0.5 * x * product - self.b * x).sum(-1), product - self.b

    @property
    def minimum(self) -> Tensor:
        return torch.linalg.solve(self.a, self.b)

    def optimizer(self, history: int = 10) -> BatchedLBFGS:
        return BatchedLBFGS(self.start, *self(self.start), history=history)


def rosenbrock(x: Tensor) -> tuple[Tensor, Tensor]:
    valley = x[:, 1] - x[:, 0] ** 2
    loss = (1 - x[:, 0]) ** 2 + 100 * valley**2
    grad = torch.stack([-2 * (1 - x[:, 0]) - 400 * x[:, 0] * valley, 200 * valley], dim=1)
    return loss, grad


def logarithmic(x: Tensor) -> tuple[Tensor, Tensor]:
    """10x - ln x, not a number for x < 0; the minimum is 0.1."""
    return (10 * x - x.log()).sum(1), 10 - 1 / x


def test_iterates_are_those_of_torch_lbfgs_when_unit_steps_are_accepted():
    problems, history, steps = Quadratics(4, 12, condition=4.0, seed=3), 3, 9
    optimizer = problems.optimizer(history)
    iterates = []
    for _ in range(steps):
        assert optimizer.step(problems).all()
        iterates.append(optimizer.x)
    for b in range(4):
        alone = problems.take([b])
        x = alone.start[0].clone().requires_grad_()
        reference = torch.optim.LBFGS([x], lr=1, max_iter=1, history_size=history, tolerance_grad=0, tolerance_change=0)

        def closure(x=x, alone=alone):
            loss, grad = alone(x.detach()[None])
            x.grad = grad[0]
            return loss[0]

        for step in range(steps):
            reference.step(closure)
            torch.testing.assert_close(iterates[step][b], x.detach(), rtol=1e-13, atol=1e-13)


def test_rosenbrock_is_solved_from_every_side():
    x = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [-3.0, -4.0], [2.0, 2.0]], dtype=torch.float64)
    optimizer = BatchedLBFGS(x, *rosenbrock(x))
    rejected = 0
    for _ in range(120):
        before = optimizer.loss
        moved = optimizer.step(rosenbrock)
        rejected += int((~moved).sum())
        assert (optimizer.loss <= before).all()
    assert rejected > 0  # the search was exercised
    torch.testing.assert_close(optimizer.x, torch.ones_like(x), rtol=0, atol=1e-6)
    loss, grad = rosenbrock(optimizer.x)
    assert torch.equal(optimizer.loss, loss) and torch.equal(optimizer.grad, grad)


def test_ill_conditioned_quadratics_reach_their_minimum():
    problems = Quadratics(3, 12, condition=1e4)
    optimizer = problems.optimizer()
    for _ in range(300):
        optimizer.step(problems)
    excess = optimizer.loss - problems(problems.minimum)[0]
    start = problems(problems.start)[0] - problems(problems.minimum)[0]
    assert (excess / start < 1e-9).all()


@pytest.mark.parametrize("spoil", ["loss", "grad"])
def test_a_problem_whose_trial_is_not_finite_stays_and_recovers(spoil):
    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = logarithmic(x)
        outside = x[:, 0] < 0
        # One of the two alone must be enough; a loss of -inf or a gradient of inf would look like progress.
        if spoil == "loss":
            return loss, torch.where(outside[:, None], torch.zeros_like(grad), grad)
        return loss.masked_fill(outside, -1e9), torch.where(outside[:, None], torch.inf, grad)

    x = torch.tensor([[0.3], [0.08]], dtype=torch.float64)
    optimizer = BatchedLBFGS(x, *evaluate(x))
    loss, grad = optimizer.loss.clone(), optimizer.grad.clone()
    assert optimizer.step(evaluate).tolist() == [False, False]
    assert torch.equal(optimizer.x[0], x[0])
    assert torch.equal(optimizer.loss[0], loss[0]) and torch.equal(optimizer.grad[0], grad[0])
    for _ in range(40):
        optimizer.step(evaluate)
    torch.testing.assert_close(optimizer.x, torch.full_like(x, 0.1), rtol=1e-6, atol=0)


def test_problems_do_not_see_each_other():
    starts = torch.tensor([[-1.2, 1.0], [5.0, -5.0], [1.0, 1.0], [0.3, 0.3]], dtype=torch.float64)
    together = BatchedLBFGS(starts, *rosenbrock(starts), history=3)
    alone = [BatchedLBFGS(x[None], *rosenbrock(x[None]), history=3) for x in starts]
    for _ in range(30):
        moved = together.step(rosenbrock)
        assert moved.tolist() == [bool(one.step(rosenbrock)) for one in alone]
        torch.testing.assert_close(together.x, torch.cat([one.x for one in alone]), rtol=1e-12, atol=1e-12)


def test_keep_goes_on_with_the_right_problems():
    problems = Quadratics(4, 6, condition=100.0)
    alone = {b: problems.take([b]).optimizer() for b in (3, 1)}
    some = problems.optimizer()
    for step in range(10):
        if step == 5:
            some.keep(torch.tensor([3, 1]))
        some.step(problems if step < 5 else problems.take([3, 1]))
        for b, one in alone.items():
            one.step(problems.take([b]))
    assert torch.equal(some.x, torch.cat([alone[3].x, alone[1].x]))
    assert torch.equal(some.loss, torch.cat([alone[3].loss, alone[1].loss]))


def test_restart_keeps_the_curvature_when_the_objective_moves():
    problems = Quadratics(2, 4, condition=50.0)
    optimizer = problems.optimizer()
    for _ in range(7):
        optimizer.step(problems)
    x = optimizer.x.clone()
    problems.b += torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer.restart_at(*problems(optimizer.x))
    assert torch.equal(optimizer.x, x) and torch.equal(optimizer.loss, problems(x)[0])
    fresh = BatchedLBFGS(x, *problems(x))
    for _ in range(3):
        optimizer.step(problems)
        fresh.step(problems)
    lowest = problems(problems.minimum)[0]
    assert (optimizer.loss - lowest < 0.1 * (fresh.loss - lowest)).all()
