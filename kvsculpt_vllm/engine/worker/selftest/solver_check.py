"""The solver: its kernels through the functions that call them, the systems it solves, and a small compression."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kvsculpt_vllm.engine.worker.selftest.notes import Notes
from kvsculpt_vllm.engine.worker.selftest.subject import Subject
from kvsculpt_vllm.kernels.attention_loss import attention_loss_twin
from kvsculpt_vllm.kernels.attention_scores import received_twin
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import compress
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.foretold import SHARPLY
from kvsculpt_vllm.sculpt.matmul import solved_by
from kvsculpt_vllm.sculpt.memory import max_elements
from kvsculpt_vllm.sculpt.objective import LSE_WEIGHT, Target
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import teach
from kvsculpt_vllm.sculpt.values import fit_values

LOGITS = 1e-4
"""How far off the largest of what hangs on logits alone may be: they are made of three TF32 products."""

PRODUCTS = 5e-3
"""The same of what is one TF32 product more: 10 bits, whose errors do not cancel where a device cuts them off."""

ERRORS = 2e-2
"""The same of losses and gradients: differences of outputs, which are smaller than those by the errors' share."""


class Size(NamedTuple):
    """Queries, entries of the span, and entries that are kept."""

    queries: int
    entries: int
    kept: int

    def __str__(self) -> str:
        return f"{self.queries} queries, {self.kept} of {self.entries} entries"


SIZES = (
    *(Size(queries, entries, kept) for queries in (160, 155, 150) for entries, kept in ((160, 80), (150, 70))),
    Size(80, 160, 80),  # fewer queries to fit to than entries: the dual system is solved
)
"""Four of five queries are fitted to, the others judge. Any prompt may bring multiples of 16 or not, for which Triton
compiles a kernel anew, and multiples of 8, which make strides of 16 of the head size and two. All have more than a tile
of queries and of entries.
"""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _each_size(subject: Subject) -> Iterator[tuple[Size, Problems]]:
    generator = _generator()
    for size in SIZES:
        yield size, make_problems(subject, size, generator)


def make_problems(subject: Subject, size: Size, generator: torch.Generator) -> Problems:
    """Two heads' problems in the queries' dtype: of each entry, and of the rest of the context."""

    def normal(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return subject.normal(*shape, generator=generator, dtype=dtype)

    # Queries look along a few directions, as a model's do: fits to some of them then hold for the others.
    heads, width, directions = 2, subject.head_size, min(12, subject.head_size)
    along = torch.bmm(
        normal(heads, size.queries, directions, dtype=torch.float32),
        normal(heads, directions, width, dtype=torch.float32),
    )
    queries = along / directions**0.5 + 0.2 * normal(heads, size.queries, width, dtype=torch.float32)
    return Problems(
        queries=queries.to(subject.dtype),
        keys=normal(heads, size.entries, width),
        values=normal(heads, size.entries, width),
        retained_lse=normal(heads, size.queries, dtype=torch.float32) + 1.0,
        retained_out=normal(heads, size.queries, width, dtype=torch.float32) * 0.3,
        held_out=torch.arange(size.queries) % 5 == 4,
        scale=subject.scale,
        soft_cap=subject.soft_cap,
    )


def _capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """The formula of a soft cap, once more: the kernels' twins have theirs."""
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


class _Teacher(NamedTuple):
    """What the full cache answers, in float64, by the formula."""

    queries: Tensor  # (B, Q, D) scaled
    keys: Tensor
    values: Tensor
    out: Tensor  # (B, Q, D)
    lse: Tensor  # (B, Q)
    retained_mass: Tensor  # (B, Q) as a share of all
    retained_sum: Tensor  # (B, Q, D)
    out_norm: Tensor  # (B,)

    @classmethod
    def of(cls, problems: Problems) -> _Teacher:
        queries, keys, values = (x.double() for x in (problems.queries, problems.keys, problems.values))
        queries = queries * problems.scale
        logits = torch.cat(
            [_capped(queries @ keys.transpose(1, 2), problems.soft_cap), problems.retained_lse.double()[..., None]],
            dim=-1,
        )
        weights, lse = logits.softmax(-1), logits.logsumexp(-1)
        mass = weights[..., -1]
        summed = mass[..., None] * problems.retained_out.double()
        out = weights[..., :-1] @ values + summed
        return cls(queries, keys, values, out, lse, mass, summed, out.square().sum(-1).mean(-1))

    def rows(self, held_out: Tensor, judging: bool) -> _Teacher:
        """That of the queries that judge, or of the others."""
        mask = held_out if judging else ~held_out
        mask = mask.to(self.queries.device)
        taken = {
            name: getattr(self, name)[:, mask] for name in ("queries", "out", "lse", "retained_mass", "retained_sum")
        }
        return self._replace(**taken)


def scores(subject: Subject, notes: Notes) -> None:
    """The pass over all queries that ranks the entries."""
    for size, problems in _each_size(subject):
        _score(notes, problems, size)


def _score(notes: Notes, problems: Problems, size: Size) -> None:
    truth, single = _Teacher.of(problems), problems.take(torch.arange(2, device=problems.keys.device))
    for power in (1, 2, SHARPLY):
        case = f"{size}, power {power}"

        def call(power: int = power) -> tuple[Tensor, ...]:
            taught = teach(single, max_elements(single.keys.device), power)
            assert taught.attention is not None  # as a power is given
            return taught.out, taught.lse, taught.attention

        out, lse, attention = notes.twice("attention and scores", case, call)
        notes.near("attention of the full cache", case, out, truth.out, PRODUCTS)
        notes.near("its log-sum-exp", case, lse, truth.lse, LOGITS)
        wanted = received_twin(truth.queries, truth.lse, truth.keys, power, problems.soft_cap)
        notes.near("attention that entries receive", case, attention, wanted, max(10, 5 * power) * LOGITS)


def _kept(problems: Problems, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (B, m, D) float32 that stand for the span, and which are no padding: of the second problem a
    third is.
    """
    counts = torch.tensor([size.kept, size.kept - size.kept // 3])
    valid = (torch.arange(size.kept) < counts[:, None]).to(problems.keys.device)
    return problems.keys[:, : size.kept].float(), problems.values[:, : size.kept].float(), valid


def losses(subject: Subject, notes: Notes) -> None:
    """The loss and its gradient, with the strides that the solver's targets have."""
    for size, problems in _each_size(subject):
        _judge(notes, problems, size)


def _judge(notes: Notes, problems: Problems, size: Size) -> None:
    truth = _Teacher.of(problems)
    keys, values, valid = _kept(problems, size)
    targets = Target.split(_single(problems), truth.out.float(), truth.lse.float())
    for judging, target in zip((False, True), targets, strict=True):
        rows = truth.rows(problems.held_out, judging)
        wanted, wanted_grad = attention_loss_twin(
            rows.queries,
            rows.lse,
            rows.out,
            rows.retained_mass,
            rows.retained_sum,
            truth.out_norm,
            keys.double(),
            values.double(),
            valid.sum(1),
            LSE_WEIGHT,
            soft_cap=problems.soft_cap,
        )
        case = f"{size}, {'held-out' if judging else 'training'} queries"
        loss, grad = notes.twice("loss and gradient", case, partial(target.loss_and_grad, keys, values, valid))
        notes.near("loss", case, loss, wanted, ERRORS)
        notes.near("gradient", case, grad, wanted_grad, ERRORS)
        notes.same("gradient of padding", case, grad[~valid], torch.zeros_like(grad[~valid]))
        notes.same("loss alone", case, target.loss(keys, values, valid), loss)


def values(subject: Subject, notes: Notes) -> None:
    """The values of the ridge least squares: the normal equations, or their dual, and their solution."""
    for size, problems in _each_size(subject):
        _fit(notes, problems, size)
        _fit(notes, problems, size._replace(kept=size.kept // 2 + 8))  # a tile is enough for those


def _fit(notes: Notes, problems: Problems, size: Size) -> None:
    every = _Teacher.of(problems)
    truth = every.rows(problems.held_out, judging=False)
    keys, start, valid = _kept(problems, size)
    train, _ = Target.split(_single(problems), every.out.float(), every.lse.float())
    # As strong as the mean diagonal: the systems are well conditioned, so that rounding shows as what it is.
    ridge = torch.tensor([1.0, 0.5], device=keys.device)
    (found,) = notes.twice("values", str(size), lambda: (fit_values(train, keys, start, ridge, valid),))
    logits = _capped(truth.queries @ keys.double().transpose(1, 2), problems.soft_cap)
    weights = (logits - truth.lse[..., None]).exp() * valid[:, None]
    mass = weights.sum(-1) + truth.retained_mass
    weights = weights / mass[..., None]
    residual = truth.out - truth.retained_sum / mass[..., None] - weights @ start.double()
    system = weights.transpose(1, 2) @ weights
    strength = ridge.double() * system.diagonal(dim1=1, dim2=2).sum(1) / valid.sum(1)
    system.diagonal(dim1=1, dim2=2).add_(strength[:, None])
    change = torch.linalg.solve(system.cpu(), (weights.transpose(1, 2) @ residual).cpu())
    notes.near("values by ridge least squares", str(size), found - start, change, ERRORS)


def systems(subject: Subject, notes: Notes) -> None:
    """What torch solves for us in batches, against float64 on the host."""
    generator = _generator()
    for count in (subject.head_size, 150):
        case = f"3 systems of {count}"
        factors = torch.randn(3, count, 2 * count, generator=generator, dtype=torch.float64)
        exact = factors @ factors.transpose(1, 2) / (2 * count)
        right = torch.randn(3, count, subject.head_size, generator=generator, dtype=torch.float64)
        given, given_right = exact.to(subject.device, torch.float32), right.to(subject.device, torch.float32)

        def call(given: Tensor = given, given_right: Tensor = given_right) -> tuple[Tensor, ...]:
            factor, info = torch.linalg.cholesky_ex(given)
            return (
                factor,
                info,
                solved_by(factor, given_right),
                torch.linalg.solve_triangular(factor, given_right, upper=False),
                torch.linalg.solve(given, given_right),
            )

        factor, info, solution, triangular, general = notes.twice("linear systems", case, call)
        wanted = torch.linalg.cholesky(exact)
        notes.same("Cholesky, systems that failed", case, info, torch.zeros_like(info))
        notes.near("Cholesky", case, factor.cpu(), wanted, PRODUCTS)
        notes.near("Cholesky's solution", case, solution.cpu(), torch.cholesky_solve(right, wanted), PRODUCTS)
        lower = torch.linalg.solve_triangular(wanted, right, upper=False)
        notes.near("triangular solution", case, triangular.cpu(), lower, PRODUCTS)
        notes.near("general solution", case, general.cpu(), torch.linalg.solve(exact, right), PRODUCTS)


def compression(subject: Subject, notes: Notes) -> None:
    """Two heads sculpted to a third: better than plain selection, and as good as the solver says."""
    page, pages = 16, 6
    size = Size(160, pages * page, 2 * page)
    problems = make_problems(subject, size, _generator())
    plan = PagePlan(page, pages, 2 * size.kept // page, 0)
    effort = Effort(positions=160, pilot_positions=80, fit_positions=160, key_steps=5)
    case, truth = str(size), _Teacher.of(problems).rows(problems.held_out, judging=True)

    def call() -> tuple[Tensor, ...]:
        done = compress(problems, plan, "sculpt", "adaptive", effort)
        return done.start_error, done.error, *done.keys, *done.values

    start_error, error, *entries = notes.twice("compression", case, call)
    notes.write("compression, error above its start", case, float((error - start_error).clamp_min(0).max()))
    for b in range(2):
        keys, values = entries[b].double(), entries[2 + b].double()
        weights = (_capped(truth.queries[b] @ keys.T, problems.soft_cap) - truth.lse[b, :, None]).exp()
        mass = weights.sum(1) + truth.retained_mass[b]
        given = (weights @ values + truth.retained_sum[b]) / mass[:, None]
        loss = (given - truth.out[b]).square().sum(1).mean() / truth.out_norm[b] + mass.log().square().mean()
        notes.near("compression, held-out error", f"{case}, head {b}", error[b], loss, 0.05)


def _single(problems: Problems) -> Problems:
    """The same in float32, and nobody else's: a target is made of it in place."""
    return problems.take(torch.arange(problems.num_problems, device=problems.keys.device))
