"""Batched L-BFGS: many independent problems, one evaluation of the whole batch a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ARMIJO = 1e-4
SHRINK = 0.25


class BatchedLBFGS:
    """Limited-memory BFGS (Nocedal & Wright, alg. 7.5) on B problems of N unknowns each.

    Each problem has its own curvature pairs, of the last `history` steps, and its own backtracking search. A step that
    gave a problem no pair leaves its slot empty: so all problems have a step's pair in the same place, and nothing is
    indexed by problem. A step costs exactly one evaluation of the batch: a problem whose trial point fails the Armijo
    test stays where it is and tries a shorter step next time, while the others move on. So the work is fixed beforehand
    and no problem waits for another.
    With every trial accepted the iterates are those of `torch.optim.LBFGS(lr=1)`.

    `x`, `loss` and `grad` always belong to the same accepted point. Nothing here waits for the device.
    """

    def __init__(self, x: Tensor, loss: Tensor, grad: Tensor, history: int = 10) -> None:
        """Start at x (B, N) with its loss (B,) and gradient (B, N)."""
        batch, size = x.shape
        self.x, self.loss, self.grad = x.clone(), loss.clone(), grad.clone()
        self.history = history
        self._s = x.new_zeros(batch, history, size)
        self._y = x.new_zeros(batch, history, size)
        self._rho = x.new_zeros(batch, history)  # 1 / s·y, 0 for an empty slot
        self._curvature = x.new_ones(batch)  # s·y / y·y of the newest pair
        self._fresh = torch.ones(batch, dtype=torch.bool, device=x.device)  # without a pair so far
        self._length = x.new_ones(batch)  # step length of the next trial
        self._tried = 0  # steps
        self._set_first_length()

    def _set_first_length(self) -> None:
        first = (1.0 / self.grad.abs().sum(1).clamp_min(torch.finfo(self.grad.dtype).tiny)).clamp_max(1.0)
        self._length = torch.where(self._fresh, first, self._length)

    def direction(self) -> Tensor:
        """The quasi-Newton descent direction (B, N); steepest descent where it would not descend."""
        # The newest first; a slot without a pair changes nothing.
        slots = [step % self.history for step in reversed(range(max(0, self._tried - self.history), self._tried))]
        d = -self.grad
        alphas = []
        for slot in slots:
            alphas.append(self._rho[:, slot] * (self._s[:, slot] * d).sum(1))
            d = torch.addcmul(d, alphas[-1][:, None], self._y[:, slot], value=-1)
        d = d * self._curvature[:, None]
        for alpha, slot in zip(reversed(alphas), reversed(slots), strict=True):
            beta = self._rho[:, slot] * (self._y[:, slot] * d).sum(1)
            d = torch.addcmul(d, (alpha - beta)[:, None], self._s[:, slot])
        descends = (d * self.grad).sum(1) < 0
        return torch.where(descends[:, None], d, -self.grad)

    def step(self, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Try one step of every problem; `evaluate` maps x (B, N) to loss (B,) and gradient (B, N).

        Returns which problems moved (B,), bool. A trial that is not finite counts as failed.
        """
        d = self.direction()
        slope = (d * self.grad).sum(1)
        trial = self.x + self._length[:, None] * d
        loss, grad = evaluate(trial)
        s, y = trial - self.x, grad - self.grad
        sy, yy = (s * y).sum(1), (y * y).sum(1)
        # A gradient that is not finite has no finite y·y.
        accepted = (loss <= self.loss + ARMIJO * self._length * slope) & (yy < torch.inf)
        keep = accepted & (sy > 1e-10 * yy.clamp_min(torch.finfo(yy.dtype).tiny)) & (sy < torch.inf)
        slot = self._tried % self.history
        for pairs, newest in ((self._s, s), (self._y, y), (self._rho, 1.0 / sy)):
            kept = keep.view(-1, *[1] * (newest.dim() - 1))
            pairs[:, slot] = torch.where(kept, newest, 0.0)
        self._curvature = torch.where(keep, sy / yy, self._curvature)
        self._fresh &= ~keep
        self._tried += 1
        self.x = torch.where(accepted[:, None], trial, self.x)
        self.grad = torch.where(accepted[:, None], grad, self.grad)
        self.loss = torch.where(accepted, loss, self.loss)
        self._length = torch.where(accepted, torch.ones_like(self._length), self._length * SHRINK)
        return accepted

    def restart_at(self, loss: Tensor, grad: Tensor) -> None:
        """Go on at the same x after the objective changed (new values); the curvature pairs stay useful."""
        self.loss, self.grad = loss.clone(), grad.clone()
        self._length = torch.ones_like(self._length)
        self._set_first_length()

    def keep(self, index: Tensor) -> None:
        """Go on with the problems in `index` only."""
        for name in ("x", "loss", "grad", "_s", "_y", "_rho", "_curvature", "_fresh", "_length"):
            setattr(self, name, getattr(self, name)[index])
