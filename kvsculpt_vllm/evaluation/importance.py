"""How far a model's answers move by what each of its layers loses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.evaluation.attention import RaggedCache
from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.metrics import compare
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.sculpt.compress import fit
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.survey import survey


@torch.no_grad()
def answers_moved(
    model: EvaluationModel,
    tokens: Sequence[int],
    num_following: int,
    effort: Effort,
    block_size: int,
    keep_ratio: float,
    power: int,
) -> np.ndarray:
    """Measure by how much the distributions of what follows change where one layer alone is compressed (L,): the mean
    KL(full || compressed), in nats, of the `num_following` last ones of `tokens`; the others are the context.

    Every head of the layer keeps the same fraction `keep_ratio`, with entries ranked by attention to the `power`.

    The losses that budgets are given out by are errors of a head's attention. How much the answer minds them differs
    a hundredfold between a model's layers (benchmarks/LOG.md), and an attention error does not tell it.
    """
    config = CompressionConfig()
    number = len(tokens) - num_following - 1
    following = tokens[number:-1]
    context = Context(model, tokens[:number], len(following), effort, block_size, config.window, config.sink)
    plan = context.plan(keep_ratio)
    found = survey(context.problems, plan, "sculpt", "uniform", effort, power=power)
    packed = context.compressed_cache(fit(context.problems, plan, found, "sculpt", effort))
    exact = context.full_cache
    wanted = model.continue_from(exact, following, number)
    heads = len(exact.keys) // model.num_layers
    moved = []
    for first in range(0, len(exact.keys), heads):
        own = slice(first, first + heads)
        keys, values = list(exact.keys), list(exact.values)
        keys[own], values[own] = packed.keys[own], packed.values[own]
        cache = RaggedCache(keys, values, exact.storage, windows=exact.windows)
        scores = compare(wanted, model.continue_from(cache, following, number), tokens[number + 1 :])
        moved.append(scores.kl.mean())
    return np.array(moved)
