"""KVzip (arXiv 2505.23416): keep what the model looks at while it writes the context once more."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvsculpt_vllm.evaluation.methods.base import Method, ToPages
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import fit
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.selection import Teacher
from kvsculpt_vllm.sculpt.survey import Survey, survey

if TYPE_CHECKING:
    from kvsculpt_vllm.evaluation.harness import Context

CHUNK = 2000
"""Tokens of the context that are repeated at a time, about, as the authors do it."""

SHOWN = 8
"""Tokens before a later chunk, by which the model is told where to go on."""

REPEAT, GO_ON = "\n\nRepeat the previous context:", "\n\nRepeat the part of the previous context starting with"


def kvzip(context: Context) -> Method:
    """Score of an entry: the most attention (``max`` over positions and the query heads of the group) that it gets
    while the model, behind the whole context, is fed a request to repeat the context and then the context itself, chunk
    by chunk. The softmax runs over the sinks, the chunk's entries and what is fed.

    Uniform budgets keep each head's highest scores. Adaptive ones keep the highest of all layers and heads, as the
    authors do, but in whole pages, as everything here: a page of a head counts as much as its entries' scores together.

    The model must have positions for the context, a chunk and the request.
    """
    scores = reconstruction_scores(context)

    def prepare(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
        of_heads = iter(scores)

        def score(part: Problems, teacher: Teacher) -> Tensor:  # is given all problems, in their order
            return torch.stack(list(islice(of_heads, part.num_problems)))

        found = survey(problems, plan, "select", "uniform", effort, score)
        if budget == "adaptive":
            found = _shared(found, scores, plan)
        return lambda plan: fit(problems, plan, found, "select", effort)

    return prepare


def _shared(found: Survey, scores: Tensor, plan: PagePlan) -> Survey:
    """Say what each head loses at every number of pages: the scores of the entries that it drops."""
    grid = range(plan.least, plan.span_pages + 1)
    total = scores.sum(1)
    kept = scores.gather(1, found.ranking.order).cumsum(1)
    curves = torch.stack([total - kept[:, plan.entries(pages) - 1] for pages in grid], 1)
    return Survey(found.ranking, grid, curves.cpu().numpy().astype(np.float64))


def reconstruction_scores(context: Context) -> Tensor:
    """The scores (L·H, n) of the span's entries, sinks left out.

    Raises:
        ValueError: the model has too few positions for a chunk behind the context.
    """
    model, tokens, span = context.model, context.tokens, context.problems.num_entries + context.sinks
    count = max(1, round(len(tokens) / CHUNK))
    borders = np.linspace(0, len(tokens), count + 1).round().astype(int).tolist()
    parts: list[Tensor] = []
    for begin, end in pairwise(borders):
        ask = model.tokenize(GO_ON if begin else REPEAT)
        if begin:
            ask = [*ask, *tokens[max(0, begin - SHOWN) : begin], *model.tokenize(":")]
        fed = [*ask, *tokens[begin:end]]
        if len(tokens) + len(fed) > model.num_positions:
            raise ValueError(
                f"--methods: kvzip feeds {len(fed)} tokens behind a context of {len(tokens)}, and the model has "
                f"{model.num_positions} positions"
            )
        parts.append(torch.stack([*_most_attention(context, fed, begin, end)]))
    return torch.cat(parts, 1)[:, context.sinks : span]


def _most_attention(context: Context, fed: list[int], begin: int, end: int) -> Iterator[Tensor]:
    """For each head what the entries from `begin` to `end` get at most while the tokens `fed` are read behind all."""
    length, exact = len(context.tokens), context.recording
    read = context.model.record(fed, length + torch.arange(len(fed)), length, context.full_cache)
    heads, group = len(read.keys) // len(read.queries), read.queries.shape[2] * len(read.queries) // len(read.keys)
    later = torch.ones(len(fed), len(fed), dtype=torch.bool, device=read.keys.device).triu(1)
    sinks = min(context.sinks, begin)  # those that are not in the chunk itself
    for number, own in enumerate(read.keys):
        layer, head = divmod(number, heads)
        seen = torch.cat([exact.keys[number, :sinks], exact.keys[number, begin:end], own]).float()
        most = torch.zeros(end - begin, device=seen.device)
        for query in range(head * group, (head + 1) * group):
            logits = read.queries[layer, :, query].float() @ seen.T * read.scale
            logits[:, -len(fed) :].masked_fill_(later, -torch.inf)
            most = torch.maximum(most, logits.softmax(-1)[:, sinks : sinks + end - begin].amax(0))
        yield most
