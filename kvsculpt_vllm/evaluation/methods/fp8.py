"""Entries in eight bits: what FP8 loses by itself, after a compression, and if a compression fits for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvsculpt_vllm.evaluation.methods.base import ToPages
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import Compressed, fit
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.survey import survey

FP8 = torch.float8_e4m3fn
"""Three bits of mantissa, as vLLM's `--kv-cache-dtype fp8`."""

ROOM = 2.0
"""A fitted key may be so many times as large as the largest of the span."""


@dataclass
class InFP8(Compressed):
    """What takes the place of a span whose cache holds FP8: `keys` and `values` are what the cache means by it."""

    key_scales: Tensor  # (B,) a number in the cache times this is an element of a key
    value_scales: Tensor  # (B,)


@dataclass(frozen=True)
class Fp8:
    """`sculpt` where the cache holds FP8 (E4M3), with a scale for the keys and one for the values of each KV head.

    Scales are powers of two. FP8 is as precise at 300 as at 3, so that other scales would gain nothing, and what the
    cache means is a number of the model's own dtype. Queries, keys and values that are fitted to have 16 bits, as a
    server sees them before they are rounded. Sinks and window are rounded, too; what comes behind the context is not.
    """

    fits: bool  # to what the cache will hold: values to rounded keys, all judged as rounded. Else rounded at the end
    calibration: LossCurves | None = None

    def __call__(self, problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
        """See `base.Method`."""
        key_scales, value_scales = (_scales(entries) for entries in (problems.keys, problems.values))
        found = survey(problems, plan, "sculpt", budget, effort, calibration=self.calibration)

        if self.fits:
            answers = found.ranking.teacher_out / value_scales[:, None, None]
            scaled = _scaled(problems, key_scales, value_scales)
            scaled_found = replace(found, ranking=replace(found.ranking, teacher_out=answers))

        def to_pages(plan: PagePlan) -> InFP8:
            if self.fits:
                fitted = fit(scaled, plan, scaled_found, "sculpt", effort, dtype=FP8)
                meant = _times
            else:
                fitted = fit(problems, plan, found, "sculpt", effort)
                meant = rounded
            own = vars(fitted)
            own["keys"], own["values"] = (
                [meant(entries, scale).to(problems.keys.dtype) for entries, scale in zip(part, scales, strict=True)]
                for part, scales in ((fitted.keys, key_scales), (fitted.values, value_scales))
            )
            return InFP8(**own, key_scales=key_scales, value_scales=value_scales)

        return to_pages


def _times(entries: Tensor, scale: Tensor) -> Tensor:
    """What a cache of FP8 means by the `entries` in it."""
    return entries.float() * scale


def rounded(entries: Tensor, scale: Tensor) -> Tensor:
    """What a cache of FP8 makes of `entries` (m, D), in their dtype."""
    most = torch.finfo(FP8).max
    return ((entries.float() / scale).clamp(-most, most).to(FP8).float() * scale).to(entries.dtype)


def _scales(entries: Tensor) -> Tensor:
    """Powers of two (B,) by which elements of `entries` (B, n, D), and larger ones, come into the range of FP8."""
    largest = entries.float().abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2(torch.ceil(torch.log2(largest * ROOM / torch.finfo(FP8).max)))


def _scaled(problems: Problems, key_scales: Tensor, value_scales: Tensor) -> Problems:
    """The same problems in the numbers that the cache will hold."""
    key_scales, value_scales = key_scales[:, None, None], value_scales[:, None, None]
    return replace(
        problems,
        queries=problems.queries * key_scales,
        keys=problems.keys.float() / key_scales,
        values=problems.values.float() / value_scales,
        retained_out=problems.retained_out / value_scales,
        foretell=None,  # it would tell of the numbers before
    )
