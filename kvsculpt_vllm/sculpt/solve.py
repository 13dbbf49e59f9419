"""Fit the entries of one group of problems: select, fit values, sculpt keys, and keep what held-out queries prefer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.lbfgs import BatchedLBFGS
from kvsculpt_vllm.sculpt.mass import match_mass
from kvsculpt_vllm.sculpt.objective import Target
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Ranking
from kvsculpt_vllm.sculpt.slices import Slices
from kvsculpt_vllm.sculpt.storage import Storage
from kvsculpt_vllm.sculpt.transfer import on_device
from kvsculpt_vllm.sculpt.values import ValueFit

RIDGES = (1e-3, 1e-2, 1e-1)
"""Ridge strengths tried at the start; held-out queries choose one for each problem."""

REFIT_EVERY = 5
"""Key steps between two closed-form value fits, as in KVSculpt; held-out queries judge at the same moments."""

PATIENCE = 2
"""Judgements without improvement after which a problem is taken out of the batch."""


@dataclass
class Fit:
    """The entries of B problems, padded to the largest, and how held-out queries judged them."""

    keys: Tensor  # (B, m, D)
    values: Tensor  # (B, m, D)
    start_error: Tensor  # (B,) held-out loss of plain selection
    error: Tensor  # (B,) held-out loss of what is returned, never above start_error
    steps: Tensor  # (B,) key steps after which the returned keys were taken, 0 for the selected keys
    failed_solves: Tensor  # (B,) systems of the values that could not be solved, so that the values stayed
    trace: Tensor  # (J, 2, B) training and held-out loss after `judged_after(key_steps)` key steps, J = 0 without any


def judged_after(key_steps: int) -> list[int]:
    """The numbers of key steps after which held-out queries judge, the start included."""
    return [*range(0, key_steps, REFIT_EVERY), key_steps]


class _Best:
    """Per problem, the candidate with the least held-out loss so far; a non-finite candidate never wins.

    Candidates are judged as they will be stored: what the cache makes of them is part of the answer.
    """

    def __init__(self, keys: Tensor, values: Tensor, held_out: Target, valid: Tensor, storage: Storage) -> None:
        """Begin with plain selection: `keys` and `values` (B, m, D) of the cache."""
        self.keys, self.values = storage.coarse_keys(keys), storage.coarse_values(values)
        self.held_out, self.valid, self.storage = held_out, valid, storage
        self.start_error = self.error = held_out.loss(self.keys, self.values, valid)
        self.steps = torch.zeros(len(keys), dtype=torch.long, device=keys.device)
        self.failed_solves = torch.zeros_like(self.steps)

    def offer_each(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Judge several `values` (R, B, m, D) for the same keys before any key step: the least loss (B,) of each
        problem, infinite if no loss is a number, and which values (B,) have it.
        """
        keys, values = self.storage.keys(keys), self.storage.values(values)
        least, choice = self.held_out.losses(keys, values, self.valid).nan_to_num(nan=torch.inf).min(0)
        improved = (least < self.error)[:, None, None]
        self.keys = torch.where(improved, keys, self.keys)
        self.values = torch.where(improved, picked(values, choice), self.values)
        self.error = torch.minimum(least, self.error)
        return least, choice

    def offer(self, keys: Tensor, values: Tensor, step: int, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Judge candidates for the problems in `index` (all if None): who improved (bool), and their losses."""
        storage, held_out, valid = self.storage, self.held_out, self.valid
        if index is None:
            index = torch.arange(len(keys), device=keys.device)
        else:
            storage, held_out, valid = storage.take(index), held_out.take(index), valid[index]
        keys, values = storage.keys(keys), storage.values(values)
        error = held_out.loss(keys, values, valid)
        improved = error < self.error[index]
        self.keys[index] = torch.where(improved[:, None, None], keys, self.keys[index])
        self.values[index] = torch.where(improved[:, None, None], values, self.values[index])
        self.error[index] = torch.where(improved, error, self.error[index])
        self.steps[index] = torch.where(improved, step, self.steps[index])
        return improved, error


@dataclass
class _Start:
    """Keys with candidates for their values, and which of these held-out queries like most."""

    keys: Tensor  # (B, m, D)
    candidates: Tensor  # (R, B, m, D), one for each of `RIDGES`
    choice: Tensor  # (B,) the best candidate's number
    error: Tensor  # (B,) its held-out loss, infinite if it is not a number

    def chosen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, the best values (B, m, D) for them, and the ridge (B,) that gave those."""
        return self.keys, picked(self.candidates, self.choice), on_device(RIDGES, self.keys.device)[self.choice]


def better(one: _Start, other: _Start) -> tuple[Tensor, Tensor, Tensor]:
    """What the better one of two starts has chosen, for every problem."""
    ours = one.error <= other.error
    keys, values, ridge = (
        torch.where(ours.view(-1, *[1] * (x.dim() - 1)), x, y)
        for x, y in zip(one.chosen(), other.chosen(), strict=True)
    )
    return keys, values, ridge


def picked(candidates: Tensor, choice: Tensor) -> Tensor:
    """Of `candidates` (R, B, …) for every problem the one whose number is in `choice` (B,)."""
    return candidates[choice, torch.arange(len(choice), device=choice.device)]


def solve(
    problems: Problems,  # fp32
    ranking: Ranking,
    sizes: Sequence[int],  # B numbers of entries to keep
    method: str,
    key_steps: int,
    storage: Storage,
    both_starts: bool = False,
) -> Slices[Fit]:
    """Fit B problems together. `method` is select, select_fit or sculpt; what follows it counts for sculpt only.

    Keys start from the selected ones with the span's mass restored (`match_mass`); with `both_starts` from the
    selected ones as they are where held-out queries prefer that.
    """
    largest, device = max(sizes), problems.keys.device
    valid = torch.arange(largest, device=device)[None, :] < on_device(sizes, device)[:, None]
    chosen = ranking.order[:, :largest].unsqueeze(-1).expand(-1, -1, problems.keys.shape[-1])
    selected, originals = problems.keys.gather(1, chosen), problems.values.gather(1, chosen)
    train, held_out = Target.split(problems, ranking.teacher_out, ranking.teacher_lse)
    del problems, ranking  # as large as the two targets, and not needed any more
    best = _Best(selected, originals, held_out, valid, storage)
    if method == "select_fit":
        yield from _fit_start(best, selected, ValueFit(train, storage.coarse_keys(selected), originals, valid))
    trace = best.error.new_zeros(0, 2, len(sizes))
    if method == "sculpt":
        weights = train.weights(selected, valid)
        keys = match_mass(train, selected, valid, weights)
        yield
        plain = None
        if both_starts:  # first, because it may write over the weights
            stored = storage.coarse_keys(selected)
            fit = ValueFit(train, stored, originals, valid, weights if stored is selected else None)
            del weights  # as large as a temporary may be: not while there are factors
            plain = yield from _fit_start(best, selected, fit)
            del fit
        else:
            del weights
        start = yield from _fit_start(best, keys, ValueFit(train, storage.coarse_keys(keys), originals, valid))
        if key_steps:
            begin = start.chosen() if plain is None else better(start, plain)
            del start, plain
            judgements = yield from _sculpt_keys(best, train, *begin, selected, originals, valid, key_steps)
            judgements += judgements[-1:] * (len(judged_after(key_steps)) - len(judgements))
            trace = torch.stack(judgements)
    return Fit(best.keys, best.values, best.start_error, best.error, best.steps, best.failed_solves, trace)


def _fit_start(best: _Best, keys: Tensor, fit: ValueFit) -> Slices[_Start]:
    """Offer least-squares values for `keys`, with each of `RIDGES`; returns what held-out queries like most."""
    yield
    candidates = fit.solve_each(on_device(RIDGES, keys.device))
    best.failed_solves += fit.failed
    del fit
    yield
    least, choice = best.offer_each(keys, candidates)
    return _Start(keys, candidates, choice, least)


def _sculpt_keys(
    best: _Best,
    train: Target,
    keys: Tensor,
    values: Tensor,
    ridge: Tensor,
    selected: Tensor,
    originals: Tensor,
    valid: Tensor,
    key_steps: int,
) -> Slices[list[Tensor]]:
    """Alternate L-BFGS steps on the keys with closed-form values (KVSculpt), each problem until it stops improving.

    Values are fitted to keys as they will be stored, where that is coarse.

    It begins with `keys` and the `values` that `ridge` gives; `originals` are those to shrink towards; `selected` are
    the keys before anything moved them, and moving far from them counts as part of the training loss
    (`Target.foreign_weight`). Returns the trace: (2, B) losses, training and held-out, at every judgement; a problem
    that has stopped keeps its last ones.
    """
    shape = keys.shape[1:]
    to_white, from_white = _whitening(train)
    # (B, m, 1): the mean over a problem's keys; padding stays where it is anyway.
    foreign = (valid * (train.foreign_weight / valid.sum(1))[:, None]).unsqueeze(-1)

    def unpack(x: Tensor) -> Tensor:
        return torch.bmm(x.view(len(x), *shape), from_white)

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        current = unpack(x)
        loss, grad = train.loss_and_grad(current, values, valid)
        moved = (current - selected) * foreign
        loss = loss + (moved * (current - selected)).sum((1, 2))
        return loss, torch.bmm(grad + 2 * moved, from_white.transpose(1, 2)).flatten(1)

    x = torch.bmm(keys, to_white).flatten(1)
    optimizer = BatchedLBFGS(x, *evaluate(x))
    storage = best.storage
    started = storage.coarse_keys(keys), storage.coarse_values(values)
    trace = [torch.stack([optimizer.loss, best.held_out.loss(*started, best.valid)])]
    everyone = torch.arange(len(keys), device=keys.device)
    index = None  # the problems that are left, None for all
    stale = torch.zeros_like(everyone)
    judgements = judged_after(key_steps)
    for number, (before, step) in enumerate(pairwise(judgements), 1):
        for _ in range(step - before):
            optimizer.step(evaluate)
            yield
        current = unpack(optimizer.x)
        refit = ValueFit(train, storage.coarse_keys(current), originals, valid)
        values = refit.solve(ridge)
        best.failed_solves[everyone if index is None else index] += refit.failed
        del refit  # it may hold weights, and the steps to come make their own
        improved, error = best.offer(current, values, step, index)
        optimizer.restart_at(*evaluate(optimizer.x))
        losses = trace[-1].clone()
        losses[:, everyone if index is None else index] = torch.stack([optimizer.loss, error])
        trace.append(losses)
        stale = torch.where(improved, torch.zeros_like(stale), stale + 1)
        if number < PATIENCE or step == key_steps:
            continue  # nobody can have stopped yet, or there is no step left to save
        yield
        # The one place where the host waits to know more: whoever takes so many steps has the time.
        alive = (stale < PATIENCE).nonzero()[:, 0]
        if len(alive) == 0:
            break
        if len(alive) < len(stale):
            index = (everyone if index is None else index)[alive]
            stale, ridge, valid = stale[alive], ridge[alive], valid[alive]
            values, originals, selected, foreign = values[alive], originals[alive], selected[alive], foreign[alive]
            to_white, from_white = to_white[alive], from_white[alive]
            train, storage = train.take(alive), storage.take(alive)
            optimizer.keep(alive)
    return trace


def _whitening(train: Target) -> tuple[Tensor, Tensor]:
    """Matrices (B, D, D) taking keys (as rows) into and out of the space where queries are white.

    With C = E[q qᵀ] = L Lᵀ and x = k L, a logit is (L⁻¹ q)·x: a unit step changes the logits by the same amount in
    every direction, so L-BFGS does not have to learn the queries' anisotropy first.
    """
    queries = train.scaled_queries
    covariance = torch.bmm(queries.transpose(1, 2), queries) / queries.shape[1]
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    # A hundredth of the mean power as a floor: directions no query looks along must not be blown up.
    diagonal.add_(1e-2 * diagonal.mean(1, keepdim=True) + 1e-12)
    factor, info = torch.linalg.cholesky_ex(covariance)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    # Only queries that are not finite fail; their problem ends at its start and must not take the others with it.
    factor = torch.where((info == 0)[:, None, None], factor, identity)
    return factor, torch.linalg.solve_triangular(factor, identity, upper=False)
