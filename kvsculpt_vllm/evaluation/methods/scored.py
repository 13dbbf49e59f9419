"""What all methods share that give every entry a score and keep the best ones as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.budgets import adaptive_budgets, uniform_budgets
from kvsculpt_vllm.sculpt.compress import MAX_ELEMENTS, Compressed, PagePlan, pilot_grid
from kvsculpt_vllm.sculpt.objective import LSE_WEIGHT, Target
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Ranking, rank


def keep_by_score(problems: Problems, plan: PagePlan, budget: str, score: Callable[[Problems], Tensor]) -> Compressed:
    """Keep the entries with the highest `score(problems)` (B, n), called with parts of the problems in fp32.

    Adaptive budgets follow the method's own error at every size, by the rule that ours follow theirs. Held-out
    errors are reported as for ours: before is selection by attention at the same budgets, after is the method.
    """
    num_problems, num_queries = problems.queries.shape[:2]
    device = problems.keys.device
    per_batch = max(1, MAX_ELEMENTS[device.type] // (num_queries * problems.num_entries))
    grid = pilot_grid(plan)
    sizes = [_entries(problems, plan, pages) for pages in grid]
    rankings, orders, errors = [], [], []
    for index in torch.arange(num_problems, device=device).split(per_batch):
        batch = problems.take(index)
        rankings.append(rank(batch, sizes))
        orders.append(score(batch).argsort(dim=1, descending=True))
        errors.append(order_errors(batch, rankings[-1], orders[-1], sizes))
    ranking, order = Ranking.join(rankings), torch.cat(orders)
    if budget == "adaptive":
        pages = adaptive_budgets(torch.cat(errors).cpu().numpy(), grid, plan.total)
    else:
        pages = uniform_budgets(num_problems, plan.total, plan.least, plan.span_pages)
    kept = [order[b, : _entries(problems, plan, count)] for b, count in enumerate(pages)]
    result = Compressed(
        pages=pages,
        keys=[problems.keys[b, chosen] for b, chosen in enumerate(kept)],
        values=[problems.values[b, chosen] for b, chosen in enumerate(kept)],
        start_error=torch.zeros(num_problems, device=device),
        error=torch.zeros(num_problems, device=device),
        steps=torch.zeros(num_problems, dtype=torch.long, device=device),
    )
    judge(result, problems, ranking)
    return result


def order_errors(problems: Problems, ranking: Ranking, order: Tensor, sizes: Sequence[int]) -> Tensor:
    """What `Ranking.errors` is for selection by attention, for any `order` (B, n): (B, G) at the G `sizes`."""
    rows = (~problems.held_out).nonzero()[:, 0]
    lse = ranking.teacher_lse[:, rows].unsqueeze(-1)
    values = problems.values.take_along_dim(order.unsqueeze(-1), dim=1)
    keys = problems.keys.take_along_dim(order.unsqueeze(-1), dim=1)
    values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    retained = (problems.retained_lse[:, rows].unsqueeze(-1) - lse).exp()
    summed = torch.cat([retained * problems.retained_out[:, rows], retained], dim=-1)
    norm = ranking.teacher_out.square().sum(-1).mean(-1)
    errors, done = [], 0
    for size in sizes:
        logits = torch.bmm(problems.queries[:, rows] * problems.scale, keys[:, done:size].transpose(1, 2)) - lse
        summed = summed + torch.bmm(logits.exp_(), values[:, done:size])
        mass = summed[..., -1:].clamp_min(torch.finfo(summed.dtype).tiny)
        output_error = (summed[..., :-1] / mass - ranking.teacher_out[:, rows]).square().sum(-1).mean(-1)
        errors.append(output_error + LSE_WEIGHT * norm * mass.log().square().mean((1, 2)))
        done = size
    return torch.stack(errors, dim=1)


def judge(result: Compressed, problems: Problems, ranking: Ranking) -> None:
    """Fill in the held-out losses of selection by attention and of what is kept; 0 where all of a span is kept."""
    for b, (keys, values) in enumerate(zip(result.keys, result.values, strict=True)):
        if len(keys) == problems.num_entries:
            continue
        index = torch.tensor([b], device=problems.keys.device)
        own, teacher = problems.take(index), ranking.take(index)
        _, held_out = Target.split(own, teacher.teacher_out, teacher.teacher_lse)
        selected = teacher.order[0, : len(keys)]
        result.start_error[b] = held_out.loss(own.keys[:, selected], own.values[:, selected])[0]
        result.error[b] = held_out.loss(keys[None].float(), values[None].float())[0]


def _entries(problems: Problems, plan: PagePlan, pages: int) -> int:
    return min(pages * plan.block_size - plan.sinks, problems.num_entries)
