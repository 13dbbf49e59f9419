"""What a check writes down: comparisons, each with how far off it was and how far off it may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Measured(NamedTuple):
    """One comparison."""

    kernel: str  # or what else was run
    case: str  # on what
    error: float
    allowed: float

    @property
    def good(self) -> bool:
        """Whether it may be so far off. What is not a number is not."""
        return self.error <= self.allowed

    def told(self) -> str:
        """How far off, and on what, for people."""
        return f"off by {self.error:.3g}, at most {self.allowed:g} is allowed ({self.case})"


class Notes:
    """The comparisons that were made, in their order. With `again`, what can race is run once more."""

    def __init__(self, again: bool = True) -> None:
        self._again = again
        self.measured: list[Measured] = []
        self.left_out: list[str] = []

    def leave_out(self, why: str) -> None:
        """Write down a check that cannot be made here, once."""
        if why not in self.left_out:
            self.left_out.append(why)

    def write(self, kernel: str, case: str, error: float, allowed: float = 0.0) -> None:
        """Write down a comparison."""
        self.measured.append(Measured(kernel, case, error, allowed))

    def near(self, kernel: str, case: str, found: Tensor, wanted: Tensor, allowed: float, share: bool = True) -> None:
        """Compare two tensors of one shape: their largest difference, as a `share` of the largest number that is
        wanted, or as it is.
        """
        wanted, found = wanted.double(), found.to(wanted.device).double()
        error = float((found - wanted).abs().max())
        if share:
            error /= max(float(wanted.abs().max()), torch.finfo(torch.float32).tiny)
        self.write(kernel, case, error if math.isfinite(error) else math.inf, allowed)

    def same(self, kernel: str, case: str, found: Tensor, wanted: Tensor) -> None:
        """Compare two tensors of one shape bit by bit: how many elements differ. What is not a number always does."""
        self.write(kernel, case, float((found != wanted).sum()))

    def twice(self, kernel: str, case: str, call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `call` returns, which must be the same bits when it is made once more: programs that race differ."""
        first = tuple(tensor.clone() for tensor in call())
        if self._again:
            unequal = sum(float((one != other).sum()) for one, other in zip(first, call(), strict=True))
            self.write(kernel, f"{case}, once more", unequal)
        return first
