"""`kvsculpt calibrate`: what every head of a model loses at every budget, averaged over contexts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers.utils import logging as transformers_logging

from kvsculpt_vllm.calibration_file import CalibrationFile
from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.evaluation.answers import Answers
from kvsculpt_vllm.evaluation.attention import Recorder
from kvsculpt_vllm.evaluation.model import EvaluationModel, load_tokenizer
from kvsculpt_vllm.evaluation.progress import progress_bar
from kvsculpt_vllm.evaluation.second_reading import Foreteller, SecondReading
from kvsculpt_vllm.evaluation.texts import DOCSTRINGS, passages, read_text
from kvsculpt_vllm.sculpt.budgets import PagePlan, grid_of, span_sizes
from kvsculpt_vllm.sculpt.effort import EFFORTS, Effort
from kvsculpt_vllm.sculpt.foretold import QueryMaps, order_in_slices
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.memory import max_elements
from kvsculpt_vllm.sculpt.problem import Earlier, Problems
from kvsculpt_vllm.sculpt.queries import asked_problems, build_problems, sample_positions
from kvsculpt_vllm.sculpt.selection import rank
from kvsculpt_vllm.sculpt.slices import at_once
from kvsculpt_vllm.sculpt.survey import pilot, survey

BLOCK_SIZE = 32
FRACTIONS = (0.03, 0.06, 0.1, 0.15, 0.22, 0.3, 0.42, 0.55, 0.75)
"""Of a span's pages, at which losses are measured, besides the least and all of them."""

RankedBy = Literal[1, 2]
"""The power of the attention that entries are ranked by (`survey.POWERS`)."""

COMPARED_AT = 0.15
"""A fraction of a span's pages at which every head of the models measured loses something."""

LENGTHS = 4
"""A context is read with so many times its tokens, of which it is the first part. A segment that others follow is
judged from one to three lengths behind it. By curves that were judged from one length behind alone it lost up to 1.9
times as much (benchmarks/LOG.md)."""

FOLLOWING = 256
"""Positions of what follows that judge, of each kind of segment."""


def calibrate(
    directory: Path,
    texts: Sequence[str],
    context: int,
    num_contexts: int,
    effort: str,
    second_weight: float,
    seed: int,
    device: str,
    console: Console,
    ranking: RankedBy | None = None,
    known: CalibrationFile | None = None,
) -> CalibrationFile:
    """Measure what each head of the model in `directory` loses at every budget, averaged over contexts of the texts:
    once in a segment that the text goes on right behind, and once in one that others follow.

    Each of the `num_contexts` contexts of each text is fitted to the queries that a prompt has, and judged by two
    readers: by what really follows in the text (`curves`), and by a second reading (`second_curves`). What a layer
    loses in a reading counts by how much the answers mind it there (`layer_weights`): layers that copy are not those
    that go on. Entries are ranked by the attention that they receive, to the power `ranking`, and those of heads that
    copy by a foretold second reading, too; what foretells it is learned first (`second_reading.Foreteller`), from as
    many contexts of prose besides: where it was learned from source code alone, identifiers in prose were lost.

    Args:
        context: tokens of each context; three times as many that follow it in the text are read, too.
        second_weight: from 0 to 1.
        seed: moves the contexts along the text.
        device: where torch computes: cpu, cuda.
        ranking: the power of the attention that entries are ranked by; None means that with which answers lose less.
        known: a calibration whose losses and ranking stay as they are, so that only the foretelling is learned.

    Raises:
        ValueError, OSError, NotImplementedError: what cannot be done, in words for the user.
    """
    transformers_logging.disable_progress_bar()
    tokenizer, prefix = load_tokenizer(directory)

    def tokens_of(text: str) -> list[int]:
        return tokenizer(read_text(text), add_special_tokens=False, verbose=False).input_ids

    chosen, prose = [], []
    for text in texts:
        read = passages(tokens_of(text), LENGTHS * context, 0, num_contexts, seed, prefix)
        chosen += [passage.context for passage in read]
    docstrings = tokens_of(DOCSTRINGS)
    if number := min(num_contexts, len(docstrings) // (context + 1)):  # as many as there are
        prose = [passage.context for passage in passages(docstrings, context, 0, number, seed, prefix)]
    counts = Counter(Path(text).name for text in texts for _ in range(num_contexts))
    evaluated = EvaluationModel.load(directory, device)
    if LENGTHS * context > evaluated.num_positions:
        raise ValueError(
            f"--context: got {context}, allowed: at most a quarter of the model's {evaluated.num_positions} positions"
        )
    powers: tuple[RankedBy, ...] = (1, 2) if ranking is None else (ranking,)
    again: list[dict[RankedBy, np.ndarray]] = []
    going_on: list[dict[RankedBy, np.ndarray]] = []
    lost = dict.fromkeys(powers, 0.0)
    following = min(FOLLOWING, context)

    def answers(tokens: Sequence[int]) -> Answers:
        read, follows = tokens[:context], tokens[context : context + following + 1]
        # A stretch of it, begun anywhere: what copies is found after a few tokens.
        middle = (context - following) // 2
        return Answers(evaluated, read, [follows, read[middle : middle + following + 1]], EFFORTS[effort], BLOCK_SIZE)

    foreteller, whole = Foreteller(), plan_of(context)
    with progress_bar(console) as progress:
        for tokens in progress.track(chosen, description="contexts read twice"):
            reading = SecondReading(evaluated, tokens[:context], len(prefix))
            foreteller.add(reading, whole.span_pages * BLOCK_SIZE, whole.sinks)
            if known is None:
                again.append(second_curves(evaluated, reading, context, effort, powers))
        for tokens in progress.track(prose, description="prose read twice"):
            foreteller.add(SecondReading(evaluated, tokens, len(prefix)), whole.span_pages * BLOCK_SIZE, whole.sinks)
        stored = foreteller.maps()
        if known is not None:
            return known.model_copy(update={"query_maps": stored})
        every = range(evaluated.num_layers), range(foreteller.kv_heads)
        maps = None if stored is None else stored.part(*every)
        for tokens in progress.track(chosen, description="contexts fitted"):
            going_on.append(curves(evaluated, tokens, effort, maps, powers))
        # Of each ranking: what a last segment loses, one that others follow, and one that is read again, (3, L·H, G).
        mean = {
            power: np.concatenate([np.mean([one[power] for one in kind], axis=0) for kind in (going_on, again)])
            for power in powers
        }
        fractions = fractions_of(whole)
        by_curves = {
            power: LossCurves(fractions, of_readings(losses[0], losses[2], second_weight), power=power, query_maps=maps)
            for power, losses in mean.items()
        }
        several = chosen if len(powers) > 1 else []
        for tokens in progress.track(several, description="rankings compared"):
            of_context = answers(tokens)
            for power, of_power in by_curves.items():
                lost[power] += of_context.lost(COMPARED_AT, of_power)[0]
        best = min(lost, key=lambda power: lost[power])
        by_layer = [
            answers(tokens).lost_by_layer(COMPARED_AT, by_curves[best])
            for tokens in progress.track(chosen, description="layers compared")
        ]
    near, far, copied = mean[best].reshape(3, evaluated.num_layers, -1, len(fractions))
    minded, minded_again = np.mean(by_layer, axis=0).T
    weights, copying = layer_weights(near, fractions, minded), layer_weights(copied, fractions, minded_again)
    copied = copied * copying[:, None, None]
    kinds = [of_readings(kind * weights[:, None, None], copied, second_weight) for kind in (near, far)]
    last, followed = (
        tuple(tuple(tuple(float(f"{loss:.6g}") for loss in head) for head in layer) for layer in kind) for kind in kinds
    )
    return CalibrationFile(
        model=directory.name,
        num_layers=near.shape[0],
        num_kv_heads=near.shape[1],
        context=context,
        texts=counts,
        second_weight=second_weight,
        fractions=fractions,
        losses=last,
        followed_losses=followed,
        power=best,
        query_maps=stored,
    )


def plan_of(context: int) -> PagePlan:
    """What there is to give out of a context of so many tokens; a survey does not need the total."""
    blocks, _ = span_sizes(context, CompressionConfig().window, BLOCK_SIZE, 1.0)
    return PagePlan(BLOCK_SIZE, blocks, 0, CompressionConfig().sink)


def fractions_of(plan: PagePlan) -> tuple[float, ...]:
    """The fractions (G,) of a span's pages at which losses are measured."""
    return tuple(pages / plan.span_pages for pages in grid_of(plan, FRACTIONS))


def curves(
    model: EvaluationModel,
    tokens: Sequence[int],
    effort: str,
    maps: QueryMaps | None,
    powers: Sequence[RankedBy] = (1, 2),
) -> dict[RankedBy, np.ndarray]:
    """Measure what each head (2, L·H, G) loses at fractions (G,) of the span of a context, the first quarter of
    `tokens`, for what follows: in a segment that is the last one, and in one that others follow. Returns the losses for
    each power of the attention that entries may be ranked by.

    A loss is the head's part of what all lose in that reading (`shares`). Fits are those that a prompt gets, to its own
    queries; heads that have `maps` keep what a second reading would ask for, too, and lose more for that with the same
    pages.

    What follows asks a last segment from the `FOLLOWING` positions right behind its window. One that others follow is
    asked from positions a context's length and more behind it, with all that is between in view: heads that look near
    then ask little of it. That is measured for the first quarter and for the second behind it, and averaged: curves of
    a text's first segment alone serve the later ones badly (benchmarks/LOG.md).
    """
    amount, length = EFFORTS[effort], len(tokens) // LENGTHS
    plan = plan_of(length)
    span, fractions = plan.span_pages * BLOCK_SIZE, fractions_of(plan)
    end, count = span + CompressionConfig().window, amount.positions_for(model.position_bytes)
    recording = model.record(tokens, torch.arange(len(tokens)))
    number = min(FOLLOWING, length)
    lost: dict[RankedBy, list[np.ndarray]] = {power: [] for power in powers}

    def judge(first: int, positions: Tensor, followed: bool = False) -> None:
        problems, judges = _fitted_and_judging(model, recording, first, span, positions, count, followed)
        own = replace(plan, sinks=0 if first else plan.sinks)
        for power, losses in lost.items():
            losses.append(shares(judged_by(problems, judges, own, amount, power, maps), fractions))

    judge(0, end + torch.arange(number))
    for first in (0, length):
        far = torch.linspace(first + end + length, len(tokens) - 1, number, dtype=torch.float64).round().long()
        judge(first, far, followed=True)
    return {power: np.stack([near, np.mean(far_ones, 0)]) for power, (near, *far_ones) in lost.items()}


def second_curves(
    model: EvaluationModel, reading: SecondReading, context: int, effort: str, powers: Sequence[RankedBy] = (1, 2)
) -> dict[RankedBy, np.ndarray]:
    """Measure what each head (1, L·H, G) loses for a second reading of a context of so many tokens, as `curves` does
    for what follows.

    In the second reading the context comes once more right behind itself, and its queries look for what they need to
    copy it, as KVzip (arXiv 2505.23416) scores entries. Some heads copy, and hardly any query of an ordinary text asks
    them to. Fits are to its own queries, which rank what they copy high without maps.
    """
    amount, plan = EFFORTS[effort], plan_of(context)
    asked = reading.problems(amount.positions_for(model.position_bytes), plan.span_pages * BLOCK_SIZE, plan.sinks)
    found: dict[RankedBy, np.ndarray] = {}
    for power in powers:
        surveyed = survey(asked, plan, "sculpt", "adaptive", amount, power=power, fractions=FRACTIONS)
        assert surveyed.curves is not None  # budgets are adaptive
        found[power] = shares(surveyed.curves, fractions_of(plan))[None]
    return found


def of_readings(follows: np.ndarray, copied: np.ndarray, second_weight: float) -> np.ndarray:
    """Losses for both readers together: `second_weight` for a second reading, the rest of 1 for what follows."""
    return (1 - second_weight) * follows + second_weight * copied


def _fitted_and_judging(
    model: EvaluationModel,
    recording: Recorder,
    first: int,
    span: int,
    positions: Tensor,
    count: int,
    followed: bool = False,
) -> tuple[Problems, Problems]:
    """Build the problems of the `span` tokens from `first` on as a prompt's segment has them, with the queries at up to
    `count` positions, and as `positions` ask them. All queries were recorded.
    """
    sinks, end = 0 if first else CompressionConfig().sink, first + span + CompressionConfig().window
    own, recent = sample_positions(first, end, count)
    own = own.to(model.device)
    problems = build_problems(
        queries=recording.queries[:, own],
        positions=own,
        recent=recent,
        keys=recording.keys[:, first:end],
        values=recording.values[:, first:end],
        span=span,
        sinks=sinks,
        rotaries=model.rotaries,
        scale=recording.scale,
        soft_cap=recording.soft_cap,
        sink_logits=recording.sink_logits,
        first=first,
        earlier=_before(recording, first),
        followed=followed,
    )
    return problems, what_follows(recording, positions.to(model.device), first, span, sinks)


def what_follows(recording: Recorder, positions: Tensor, first: int, span: int, sinks: int) -> Problems:
    """Build the problems of the `span` tokens from `first` on, of which `sinks` stay exact, that are asked by the text
    itself: by the queries at `positions` (P,), which see all that is before them. All are held out.
    """
    last = int(positions.max()) + 1
    return asked_problems(
        recording.queries[:, positions.to(recording.queries.device)],
        positions,
        torch.ones(len(positions), dtype=torch.bool),
        keys=recording.keys[:, first:last],
        values=recording.values[:, first:last],
        span=span,
        sinks=sinks,
        scale=recording.scale,
        soft_cap=recording.soft_cap,
        sink_logits=recording.sink_logits,
        first=first,
        earlier=_before(recording, first),
    )


def _before(recording: Recorder, first: int) -> Earlier | None:
    """What is before the token `first`, exactly as it was recorded; None if that is nothing."""
    return Earlier(list(recording.keys[:, :first]), list(recording.values[:, :first])) if first else None


def judged_by(
    problems: Problems,
    judges: Problems,
    plan: PagePlan,
    effort: Effort,
    power: RankedBy,
    maps: QueryMaps | None = None,
) -> np.ndarray:
    """Measure what each head loses (B, G) for the queries of `judges` at `FRACTIONS` of the span, the least and the
    whole, after quick fits to those of `problems`: both are of the same entries. Those of heads that have `maps` are
    ranked by a foretold second reading, too.
    """
    limit = max_elements(problems.keys.device)
    with fast_matmul():
        ranking, told = rank(problems, limit, power=power), rank(judges, limit)
        if maps is not None:
            ranking = at_once(order_in_slices)(problems, ranking, maps, limit)
        rows = problems.thin_rows(effort.pilot_positions * problems.group)
        rows = rows[~problems.held_out[rows]]
        few, teacher = problems.with_rows(rows), ranking.with_rows(rows)
        both = replace(
            few,
            queries=torch.cat([few.queries, judges.queries], 1),
            retained_out=torch.cat([few.retained_out, judges.retained_out], 1),
            retained_lse=torch.cat([few.retained_lse, judges.retained_lse], 1),
            held_out=torch.cat([few.held_out, judges.held_out]),
        )
        teacher = replace(
            teacher,
            teacher_out=torch.cat([teacher.teacher_out, told.teacher_out], 1),
            teacher_lse=torch.cat([teacher.teacher_lse, told.teacher_lse], 1),
        )
        everything = replace(effort, pilot_positions=len(both.held_out))
        losses = at_once(pilot)(both, teacher, plan, grid_of(plan, FRACTIONS), "sculpt", everything, limit)
    return losses.cpu().numpy()


def shares(losses: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    """Divide losses (B, G) at `fractions` (G,) by what all heads together lose at the fraction `COMPARED_AT`.

    Raises:
        ValueError: they lose nothing there.
    """
    whole = np.interp(COMPARED_AT, fractions, losses.sum(0))
    if not whole > 0:
        raise ValueError(f"no head loses anything with {COMPARED_AT} of its pages, so that there is nothing to compare")
    return losses / whole


def layer_weights(losses: np.ndarray, fractions: Sequence[float], alone: np.ndarray) -> np.ndarray:
    """Weigh the layers (L,) by how much the answers lose by each of them alone, `alone` (L,), for what its heads lose
    together at the fraction `COMPARED_AT`, by `losses` (L, H, G) at `fractions` (G,): by the root of that ratio.
    Altogether the layers lose as much as before. A layer that loses nothing there, though it may with fewer pages,
    weighs as much as the others do on the geometric mean; one whose errors the answers do not mind at all, as little as
    the least of them.

    Without weights budgets go to layers whose errors are large and whose answers hardly mind: behind an error near a
    model's end there are few layers that could make more of it. The ratio itself is no better than no weights on one
    text of two (benchmarks/LOG.md): it is measured where all other layers are exact.

    Raises:
        ValueError: no layer's errors change the answers.
    """
    lost = np.array([[np.interp(COMPARED_AT, fractions, head) for head in layer] for layer in losses]).sum(1)
    minded = (lost > 0) & (alone > 0)
    if not minded.any():
        raise ValueError(
            f"no layer alone changes the answers with {COMPARED_AT} of its pages: there is nothing to weigh"
        )
    known = np.sqrt(alone[minded] / lost[minded])
    weights = np.where(lost > 0, known.min(), np.exp(np.log(known).mean()))
    weights[minded] = known
    return weights * (lost.sum() / (weights * lost).sum())
