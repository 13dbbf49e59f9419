"""Entries in eight bits: what FP8 loses by itself, after a compression, and if a compression fits for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsculpt_vllm.evaluation.methods.base import ToPages
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import Compressed, fit
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.survey import Survey, survey
from kvsculpt_vllm.sculpt.turned import hadamard

if TYPE_CHECKING:
    from kvsculpt_vllm.evaluation.harness import Context

FP8 = torch.float8_e4m3fn
"""Three bits of mantissa, as vLLM's `--kv-cache-dtype fp8`."""

ROOM = 2.0
"""A fitted key may be so many times as large as the largest of the span."""


@dataclass(frozen=True)
class Form:
    """How a cache of FP8 holds the keys, or the values, of B heads.

    A number in the cache times its head's scale is an element of the entry, in the basis of the `turn` and from the
    `centres` on (`sculpt.turned`).
    """

    scales: Tensor  # (B,) powers of two
    turn: Tensor | None = None  # (D, D), its own inverse; None for the model's own basis
    centres: Tensor | None = None  # (B, D); None for 0

    @classmethod
    def of(cls, entries: Tensor, turn: Tensor | None = None, centres: Tensor | None = None) -> Form:
        """Choose scales for `entries` (B, n, D)."""
        form = cls(torch.ones(len(entries), device=entries.device), turn, centres)
        return replace(form, scales=_scales(form.numbers(entries)))

    def numbers(self, entries: Tensor) -> Tensor:
        """What is to be rounded of `entries` (B, n, D), float32."""
        entries = entries.float()
        if self.centres is not None:
            entries = entries - self.centres[:, None]
        if self.turn is not None:
            entries = entries @ self.turn
        return entries / self.scales[:, None, None]

    def of_head(self, head: int) -> Form:
        """Keep one head."""
        centres = None if self.centres is None else self.centres[head : head + 1]
        return Form(self.scales[head : head + 1], self.turn, centres)

    def meant(self, head: int, numbers: Tensor) -> Tensor:
        """The entries (m, D) that `numbers` in the cache of one head are, float32."""
        entries = numbers.float() * self.scales[head]
        if self.turn is not None:
            entries = entries @ self.turn
        return entries if self.centres is None else entries + self.centres[head]

    def rounded(self, entries: Tensor) -> Tensor:
        """What a cache of FP8 makes of `entries` (B, n, D), float32."""
        most = torch.finfo(FP8).max
        stored = self.numbers(entries).clamp(-most, most).to(FP8)
        return torch.stack([self.meant(head, numbers) for head, numbers in enumerate(stored)])


@dataclass
class InFP8(Compressed):
    """What takes the place of a span whose cache holds FP8: `keys` and `values` are what the cache means by it.

    They are float32: in FP8 and from a centre on, a large key may be more precise than in 16 bits.
    """

    key_form: Form
    value_form: Form


@dataclass(frozen=True)
class Fp8:
    """`sculpt` where the cache holds FP8 (E4M3), with a scale for the keys and one for the values of each KV head.

    Scales are powers of two. FP8 is as precise at 300 as at 3, so that other scales would gain nothing, and what the
    cache means is a number of the model's own dtype. Queries, keys and values that are fitted to have 16 bits, as a
    server sees them before they are rounded. Sinks and window are rounded, too; what comes behind the context is not.
    """

    fits: bool  # to what the cache will hold: values to rounded keys, all judged as rounded. Else rounded at the end
    calibration: LossCurves | None = None
    turn: Tensor | None = None  # of keys and values: see `Form`
    centres: Tensor | None = None  # of the keys

    def __call__(self, problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
        """See `base.Method`."""
        key_form = Form.of(problems.keys, self.turn, self.centres)
        value_form = Form.of(problems.values, self.turn)
        found = survey(problems, plan, "sculpt", budget, effort, calibration=self.calibration)
        if self.fits:
            stored, as_stored = stored_problems(problems, found, key_form, value_form)

        def to_pages(plan: PagePlan) -> InFP8:
            if self.fits:
                fitted = fit(stored, plan, as_stored, "sculpt", effort, dtype=FP8)
                keys, values = (
                    [form.meant(head, numbers) for head, numbers in enumerate(part)]
                    for part, form in ((fitted.keys, key_form), (fitted.values, value_form))
                )
            else:
                fitted = fit(problems, plan, found, "sculpt", effort)
                keys, values = (
                    [form.of_head(head).rounded(entries[None])[0] for head, entries in enumerate(part)]
                    for part, form in ((fitted.keys, key_form), (fitted.values, value_form))
                )
            own = vars(fitted) | {"keys": keys, "values": values}
            return InFP8(**own, key_form=key_form, value_form=value_form)

        return to_pages


def in_hadamard_basis(context: Context, calibration: LossCurves | None = None) -> Fp8:
    """Make the method that turns keys and values by a Hadamard matrix before they are rounded, and takes from the keys
    what a bias gives all of them (`sculpt.turned`). A soft cap and a learned sink would notice the latter.
    """
    recording = context.recording
    notices = recording.soft_cap is not None or recording.sink_logits is not None
    turn = hadamard(recording.keys.shape[-1]).to(recording.keys.device)
    return Fp8(True, calibration, turn, None if notices else context.model.key_centres)


def _scales(numbers: Tensor) -> Tensor:
    """Powers of two (B,) by which `numbers` (B, n, D), and larger ones, come into the range of FP8."""
    largest = numbers.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2(torch.ceil(torch.log2(largest * ROOM / torch.finfo(FP8).max)))


def stored_problems(problems: Problems, found: Survey, key_form: Form, value_form: Form) -> tuple[Problems, Survey]:
    """The same problems in the numbers that the cache will hold, and what was found of them."""
    queries, value_scales = problems.queries.float(), value_form.scales[:, None, None]
    lse, teacher_lse = problems.retained_lse, found.ranking.teacher_lse
    if key_form.centres is not None:  # all logits of a query are less by one number
        less = (queries @ key_form.centres[:, :, None])[..., 0] * problems.scale
        lse, teacher_lse = lse - less, teacher_lse - less
    if key_form.turn is not None:
        queries = queries @ key_form.turn
    answers, retained = found.ranking.teacher_out, problems.retained_out
    if value_form.turn is not None:
        answers, retained = answers @ value_form.turn, retained @ value_form.turn
    stored = replace(
        problems,
        queries=queries * key_form.scales[:, None, None],
        keys=key_form.numbers(problems.keys),
        values=value_form.numbers(problems.values),
        retained_lse=lse,
        retained_out=retained / value_scales,
        foretell=None,  # it would tell of the numbers before
    )
    ranking = replace(found.ranking, teacher_out=answers / value_scales, teacher_lse=teacher_lse)
    return stored, replace(found, ranking=ranking)
