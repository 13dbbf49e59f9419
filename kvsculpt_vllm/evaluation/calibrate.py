"""`kvsculpt calibrate`: what every head of a model loses at every budget, averaged over contexts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from kvsculpt_vllm.calibration_file import CalibrationFile
from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.model import EvaluationModel, load_tokenizer
from kvsculpt_vllm.evaluation.progress import progress_bar
from kvsculpt_vllm.evaluation.texts import passages, read_text
from kvsculpt_vllm.sculpt.effort import EFFORTS
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.queries import asked_problems, held_out_of
from kvsculpt_vllm.sculpt.survey import survey

BLOCK_SIZE = 32
FRACTIONS = (0.03, 0.06, 0.1, 0.15, 0.22, 0.3, 0.42, 0.55, 0.75)
"""Of a span's pages, at which losses are measured, besides the least and all of them."""

COMPARED_AT = 0.15
"""A fraction of a span's pages at which every head of the models measured loses something."""


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
) -> CalibrationFile:
    """Measure what each head of the model in `directory` loses at every budget, averaged over contexts of the texts.

    Each of the `num_contexts` contexts of each text is read twice. The first reading is the prompt's own. In the second
    reading the context comes once more behind itself, and its queries look for what they need to copy it, as KVzip
    (arXiv 2505.23416) scores entries. Some heads copy, and hardly any query of an ordinary prompt asks them to.

    A head's loss counts as its share of what all heads lose in the same reading with `COMPARED_AT` of their pages.
    Heads lose four to ten times as much in a second reading, and a plain sum would be the second reading's alone. The
    shares of the second reading have the weight `second_weight`, those of the first one the rest of 1 (measured:
    benchmarks/LOG.md).

    Args:
        context: tokens of each context.
        second_weight: from 0 to 1.
        seed: moves the contexts along the text.
        device: where torch computes: cpu, cuda.

    Raises:
        ValueError, OSError, NotImplementedError: what cannot be done, in words for the user.
    """
    transformers_logging.disable_progress_bar()
    tokenizer, prefix = load_tokenizer(directory)
    chosen: list[list[int]] = []
    counts: Counter[str] = Counter()
    for text in texts:
        counts[Path(text).name] += num_contexts
        tokens = tokenizer(read_text(text), add_special_tokens=False, verbose=False).input_ids
        chosen += [passage.context for passage in passages(tokens, context, 0, num_contexts, seed, prefix)]
    evaluated = EvaluationModel.load(directory, device)
    if 2 * context > evaluated.num_positions:
        raise ValueError(
            f"--context: got {context}, allowed: at most half of the model's {evaluated.num_positions} positions"
        )
    fractions: tuple[float, ...] = ()
    found: list[np.ndarray] = []
    with progress_bar(console) as progress:
        for tokens in progress.track(chosen, description="contexts read"):
            fractions, losses = curves(evaluated, tokens, effort, second_weight, len(prefix))
            found.append(losses)
    mean = np.mean(found, axis=0).reshape(evaluated.num_layers, -1, len(fractions))
    return CalibrationFile(
        model=directory.name,
        num_layers=mean.shape[0],
        num_kv_heads=mean.shape[1],
        context=context,
        texts=counts,
        second_weight=second_weight,
        fractions=fractions,
        losses=tuple(tuple(tuple(float(f"{loss:.6g}") for loss in head) for head in layer) for layer in mean),
    )


def curves(
    model: EvaluationModel, tokens: Sequence[int], effort: str, second_weight: float, prefix: int = 0
) -> tuple[tuple[float, ...], np.ndarray]:
    """Measure what each head (L·H, G) loses in one context, `tokens`, at fractions (G,) of its span; returns both.

    A loss is the weighted mean of the head's `shares` in the two readings: `second_weight` for the second one, the rest
    of 1 for the first one. The first `prefix` tokens (a BOS token, say) are not read again.
    """
    exact, amount = CompressionConfig(), EFFORTS[effort]
    context = Context(model, tokens, 0, amount, BLOCK_SIZE, exact.window, exact.sink)
    plan = context.plan(1.0)
    again, count = tokens[prefix:], amount.positions_for(model.position_bytes)
    asked_again = second_reading(model, tokens, again, count, plan.span_pages * BLOCK_SIZE, exact.sink)
    readings = [
        survey(problems, plan, "sculpt", "adaptive", amount, fractions=FRACTIONS)
        for problems in (context.problems, asked_again)
    ]
    fractions = tuple(count / plan.span_pages for count in readings[0].grid)
    weights = 1 - second_weight, second_weight
    losses = [found.curves for found in readings if found.curves is not None]  # both: budgets are adaptive
    return fractions, np.average([shares(curves, fractions) for curves in losses], 0, weights)


def shares(losses: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    """Divide losses (B, G) at `fractions` (G,) by what all heads together lose at the fraction `COMPARED_AT`.

    Raises:
        ValueError: they lose nothing there.
    """
    whole = np.interp(COMPARED_AT, fractions, losses.sum(0))
    if not whole > 0:
        raise ValueError(f"no head loses anything with {COMPARED_AT} of its pages, so that there is nothing to compare")
    return losses / whole


def second_reading(
    model: EvaluationModel, tokens: Sequence[int], again: Sequence[int], count: int, span: int, sinks: int
) -> Problems:
    """Build the problems of a context, `tokens`, whose queries come from reading it `again` behind itself.

    They are the queries at `count` positions of the second reading. What these would see of their own reading is left
    out: only the first reading's entries are to be compressed.
    """
    number = len(tokens)
    spread = torch.linspace(0, len(again) - 1, min(count, len(again)), dtype=torch.float64).round().long()
    positions = number + spread
    recording = model.record([*tokens, *again], positions)
    return asked_problems(
        recording.queries,
        positions,
        held_out_of(len(positions)),
        keys=recording.keys[:, :number],
        values=recording.values[:, :number],
        span=span,
        sinks=sinks,
        scale=recording.scale,
    )
