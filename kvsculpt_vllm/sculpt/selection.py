"""Which entries matter: the order selection keeps them in, and what is lost at every budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvsculpt_vllm.kernels.attention_scores import attention_with_lse, received
from kvsculpt_vllm.kernels.dispatch import use_triton
from kvsculpt_vllm.kernels.soft_cap import capped
from kvsculpt_vllm.sculpt.attention import merge
from kvsculpt_vllm.sculpt.matmul import matvec
from kvsculpt_vllm.sculpt.objective import LSE_WEIGHT, with_ones
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.slices import Slices, at_once
from kvsculpt_vllm.sculpt.transfer import on_device


@dataclass(frozen=True)
class Teacher:
    """What the full cache answers, and how much attention each entry of the span gets from the queries."""

    out: Tensor  # (B, Q, D)
    lse: Tensor  # (B, Q)
    # (B, n) Σ_q p_qj^power, p being the softmax over the span and the retained entries; None if nobody asked for it
    attention: Tensor | None


@dataclass(frozen=True)
class Ranking:
    """The entries of each problem in the order in which selection keeps them, and the teacher found on the way."""

    order: Tensor  # (B, n) entry indices, the first to be kept first
    teacher_out: Tensor  # (B, Q, D) for all query rows, or those that were asked for
    teacher_lse: Tensor  # (B, Q)

    def take(self, index: Tensor | slice) -> Ranking:
        """The rankings of the problems in `index`."""
        return Ranking(**{name: tensor[index] for name, tensor in vars(self).items()})

    def with_rows(self, rows: Tensor) -> Ranking:
        """The same ranking with the teacher of the query rows `rows` (LongTensor, on the host) only."""
        there = on_device(rows, self.order.device)
        return replace(self, teacher_out=self.teacher_out[:, there], teacher_lse=self.teacher_lse[:, there])


Score = Callable[[Problems, Teacher], Tensor]
"""A number (B, n) per entry of fp32 problems; those with the highest are kept."""


def by_attention(problems: Problems, teacher: Teacher) -> Tensor:
    """The attention an entry receives, summed over the queries of the head's group (as in H2O, SnapKV, KVSculpt)."""
    assert teacher.attention is not None  # a ranking asks for it
    return teacher.attention


def rank_in_slices(
    problems: Problems,
    max_elements: int,
    score: Score = by_attention,
    power: int = 1,
    answered: Tensor | None = None,
) -> Slices[Ranking]:
    """Order the entries of all problems by `score`. All queries are asked; what the full cache answers is kept for the
    query rows `answered` (LongTensor, ascending, on the host), None for all.

    Held-out queries count too: a position that is not asked from leaves the entries that it alone would look at
    unprotected, which costs more than what an unseen query gains for the judgement of later fits
    (benchmarks/LOG.md). Works on at most `max_elements` weights at once, so that memory does not grow with the span.
    """
    num_problems, num_queries, width = problems.queries.shape
    shape = (num_problems, num_queries if answered is None else len(answered), width)
    device = problems.keys.device
    # Filled in place: parts that are joined at the end would all be there twice.
    ranking = Ranking(
        order=torch.empty(problems.keys.shape[:2], dtype=torch.long, device=device),
        teacher_out=torch.empty(shape, device=device),
        teacher_lse=torch.empty(shape[:2], device=device),
    )
    for own in batches(problems, max_elements):
        batch = problems.take(own)
        teacher = teach(batch, max_elements, power, answered)
        ranking.order[own] = score(batch, teacher).argsort(dim=1, descending=True)
        if shape[1]:  # copies of nothing are launched, too
            ranking.teacher_out[own], ranking.teacher_lse[own] = teacher.out, teacher.lse
        yield
    return ranking


rank = at_once(rank_in_slices)


def selection_errors(problems: Problems, ranking: Ranking, sizes: Sequence[int], max_elements: int) -> Slices[Tensor]:
    """The loss (B, G) of plain selection at each of G `sizes` (ascending, at most n), over all queries."""
    errors = []
    for own in batches(problems, max_elements):
        errors.append(_errors(problems.take(own), ranking.take(own), sizes, max_elements))
        yield
    return torch.cat(errors)


def taught_in_slices(problems: Problems, order: Tensor, max_elements: int) -> Slices[Ranking]:
    """Find what the full cache answers to the queries of problems whose entries' `order` (B, n) is known."""
    out, lse = torch.empty_like(problems.queries), torch.empty_like(problems.retained_lse)
    for own in batches(problems, max_elements):
        teacher = teach(problems.take(own), max_elements, power=None)
        out[own], lse[own] = teacher.out, teacher.lse
        yield
    return Ranking(order, out, lse)


def batches(problems: Problems, max_elements: int) -> Iterator[slice]:
    """Consecutive problems, as many at once as have no more than `max_elements` weights together, or no more elements
    of queries where a kernel keeps no weights.
    """
    each = 2 * problems.queries.shape[2] if use_triton(problems.keys) else problems.num_entries
    per_batch = max(1, max_elements // (problems.queries.shape[1] * each))
    for first in range(0, problems.num_problems, per_batch):
        yield slice(first, min(first + per_batch, problems.num_problems))


def teach(problems: Problems, max_elements: int, power: int | None = 1, answered: Tensor | None = None) -> Teacher:
    """Attention over everything, for fp32 `problems`, without keeping a matrix of weights; what the entries receive to
    some `power`, or not at all. What is answered is kept for the query rows `answered` (LongTensor, on the host), None
    for all; the others are asked for the attention that they give.
    """
    if use_triton(problems.keys):
        return _teach_by_kernel(problems, power, answered)
    values = with_ones(problems.values)  # the column of ones sums the weights
    received = torch.zeros_like(problems.values[..., :1])
    # Not even one row need be wanted.
    outs, lses = [problems.retained_out[:, :0]], [problems.retained_lse[:, :0]]
    for rows, wanted in _asked(problems, max_elements, answered, others=power is not None):
        # By entry (B, n, q): the sum that ranks entries runs along memory, as do the rows taken in `_errors`.
        weights = _logits(problems, problems.keys, rows)
        peak = weights.amax(1, keepdim=True)
        weights = weights.sub_(peak).exp_()
        retained_lse = problems.retained_lse[:, rows]
        if wanted:
            both = torch.bmm(weights.transpose(1, 2), values)
            of_span, of_span_lse = both[..., :-1] / both[..., -1:], both[..., -1].log() + peak[:, 0]
            out, lse = merge(of_span, of_span_lse, problems.retained_out[:, rows], retained_lse)
            outs.append(out)
            lses.append(lse)
        else:
            lse = torch.logaddexp(weights.sum(1).log() + peak[:, 0], retained_lse)
        if power is not None:
            to_share = (peak[:, 0] - lse).exp()
            received += matvec(weights.pow_(power), to_share.pow(power).unsqueeze(-1))
    attention = None if power is None else received.squeeze(-1)
    return Teacher(torch.cat(outs, dim=1), torch.cat(lses, dim=1), attention)


def _teach_by_kernel(problems: Problems, power: int | None, answered: Tensor | None) -> Teacher:
    queries = problems.queries * problems.scale
    out, lse = merge(
        *attention_with_lse(queries, problems.keys, problems.values, problems.soft_cap),
        problems.retained_out,
        problems.retained_lse,
    )
    attention = None if power is None else received(queries, lse, problems.keys, power, problems.soft_cap)
    if answered is not None:
        there = on_device(answered, queries.device) if len(answered) else slice(0)
        out, lse = out[:, there], lse[:, there]
    return Teacher(out, lse, attention)


def _errors(problems: Problems, ranking: Ranking, sizes: Sequence[int], max_elements: int) -> Tensor:
    teacher_out, teacher_lse, order = ranking.teacher_out, ranking.teacher_lse, ranking.order
    values = with_ones(problems.values).take_along_dim(order.unsqueeze(-1), dim=1)
    keys = problems.keys.take_along_dim(order.unsqueeze(-1), dim=1)
    norm = teacher_out.square().sum(-1).mean(-1)
    total = values.new_zeros(len(sizes), len(values))
    for rows in _row_parts(problems, max_elements):
        wanted, lse = teacher_out[:, rows], teacher_lse[:, rows]
        shares = _logits(problems, keys[:, : sizes[-1]], rows)
        shares = shares.sub_(lse[:, None]).exp_()
        retained = (problems.retained_lse[:, rows] - lse).exp().unsqueeze(-1)
        summed = torch.cat([retained * problems.retained_out[:, rows], retained], dim=-1)
        done = 0
        for i, size in enumerate(sizes):
            summed = summed + torch.bmm(shares[:, done:size].transpose(1, 2), values[:, done:size])
            # A query whose weights on everything kept underflow is answered with 0, an error of its full output.
            mass = summed[..., -1:].clamp_min(torch.finfo(summed.dtype).tiny)
            output_error = (summed[..., :-1] / mass - wanted).square().sum(-1) / norm[:, None]
            lse_error = mass.log().square().squeeze(-1)
            total[i] += (output_error + LSE_WEIGHT * lse_error).sum(1)
            done = size
    return total.T / problems.queries.shape[1]


def _logits(problems: Problems, keys: Tensor, rows: slice | Tensor) -> Tensor:
    """What the queries in `rows` make of keys (B, n, D): logits (B, n, q)."""
    logits = torch.bmm(keys, problems.queries[:, rows].transpose(1, 2) * problems.scale)
    return capped(logits, problems.soft_cap)


def _asked(
    problems: Problems, max_elements: int, answered: Tensor | None, others: bool
) -> Iterator[tuple[slice | Tensor, bool]]:
    """The query rows `answered`, some at a time, and True; then with False the `others`, if they are to be asked."""
    yield from ((rows, True) for rows in _row_parts(problems, max_elements, answered))
    if answered is not None and others:
        left = torch.ones(problems.queries.shape[1], dtype=torch.bool).index_fill_(0, answered, False)
        yield from ((rows, False) for rows in _row_parts(problems, max_elements, left.nonzero()[:, 0]))


def _row_parts(problems: Problems, max_elements: int, among: Tensor | None = None) -> Iterator[slice | Tensor]:
    """All query rows, or those `among` (LongTensor, on the host), some at a time."""
    num_problems, num_queries = problems.queries.shape[:2]
    step = max(1, max_elements // (num_problems * problems.num_entries))
    for first in range(0, num_queries if among is None else len(among), step):
        part = slice(first, first + step)
        yield part if among is None else on_device(among[part], problems.keys.device)
