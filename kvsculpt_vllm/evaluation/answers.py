"""What a model's answers lose by a compression, and by that of each layer alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.evaluation.attention import RaggedCache
from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.methods.base import surveyed
from kvsculpt_vllm.evaluation.metrics import compare
from kvsculpt_vllm.evaluation.model import EvaluationModel
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.loss_curves import LossCurves


class Answers:
    """A context and what comes behind it, as the full cache answers: what a compression is judged by."""

    @torch.no_grad()
    def __init__(
        self,
        model: EvaluationModel,
        tokens: Sequence[int],
        readings: Sequence[Sequence[int]],
        effort: Effort,
        block_size: int,
    ) -> None:
        """Compute the context, `tokens`, and each of the `readings` right behind it; the last token of a reading is
        only told.
        """
        config, longest = CompressionConfig(), max(len(reading) for reading in readings) - 1
        self._context = Context(model, tokens, longest, effort, block_size, config.window, config.sink)
        self._model, self._effort, self._readings = model, effort, readings
        full = self._context.full_cache
        self._full = [model.continue_from(full, reading[:-1], len(tokens)) for reading in readings]

    def lost(self, keep_ratio: float, curves: LossCurves) -> np.ndarray:
        """Measure the mean KL(full || compressed), in nats, of each reading (R,) behind the context, of which every
        head keeps what `curves` give it, ranked as they say.
        """
        return self._lost(self._compressed(keep_ratio, "adaptive", curves))

    def lost_by_layer(self, keep_ratio: float, curves: LossCurves) -> np.ndarray:
        """Measure the same where one layer alone is compressed (L, R), each of whose heads keeps the same fraction,
        with entries ranked as `curves` say.

        The losses that budgets are given out by are errors of a head's attention. How much the answers mind them
        differs a hundredfold between a model's layers (benchmarks/LOG.md), and an attention's error does not tell it.
        """
        packed, exact = self._compressed(keep_ratio, "uniform", curves), self._context.full_cache
        heads = len(exact.keys) // self._model.num_layers
        lost = []
        for first in range(0, len(exact.keys), heads):
            own = slice(first, first + heads)
            keys, values = list(exact.keys), list(exact.values)
            keys[own], values[own] = packed.keys[own], packed.values[own]
            lost.append(self._lost(replace(exact, keys=keys, values=values)))
        return np.stack(lost)

    def _compressed(self, keep_ratio: float, budget: str, curves: LossCurves) -> RaggedCache:
        return next(self._context.compress(surveyed("sculpt", calibration=curves), budget, [keep_ratio])).cache

    @torch.no_grad()
    def _lost(self, cache: RaggedCache) -> np.ndarray:
        lost = []
        for full, reading in zip(self._full, self._readings, strict=True):
            answers = self._model.continue_from(cache, reading[:-1], self._context.num_tokens)
            lost.append(float(compare(full, answers, reading[1:]).kl.mean()))
        return np.array(lost)
