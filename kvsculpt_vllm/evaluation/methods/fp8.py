"""Entries in eight bits: what FP8 loses by itself, after a compression, and if a compression fits for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kvsculpt_vllm.evaluation.methods.base import ToPages
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import Compressed, fit
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.problem import Problems
from kvsculpt_vllm.sculpt.storage import Form, Storage
from kvsculpt_vllm.sculpt.survey import survey
from kvsculpt_vllm.sculpt.turned import hadamard

if TYPE_CHECKING:
    from kvsculpt_vllm.evaluation.harness import Context


@dataclass
class InFP8(Compressed):
    """What takes the place of a span whose cache holds FP8: `keys` and `values` are what the cache means by it.

    They are float32: in FP8 and from a centre on, a large key may be more precise than in 16 bits.
    """

    forms: tuple[Form, Form]  # of keys and of values


@dataclass(frozen=True)
class Fp8:
    """`sculpt` where the cache holds FP8 (E4M3), with a scale for the keys and one for the values of each KV head.

    Queries, keys and values that are fitted to have 16 bits, as a server sees them before they are rounded. Sinks and
    window are rounded, too; what comes behind the context is not.
    """

    fits: bool  # to what the cache will hold: values to rounded keys, all judged as rounded. Else rounded at the end
    calibration: LossCurves | None = None
    turn: Tensor | None = None  # of keys and values: see `Form`
    centres: Tensor | None = None  # of the keys

    def __call__(self, problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> ToPages:
        """See `base.Method`."""
        forms = Form.of(problems.keys, self.turn, self.centres), Form.of(problems.values, self.turn)
        storage = Storage(problems.keys.dtype, forms)
        found = survey(problems, plan, "sculpt", budget, effort, calibration=self.calibration)

        def to_pages(plan: PagePlan) -> InFP8:
            fitted = fit(problems, plan, found, "sculpt", effort, storage=storage if self.fits else None)
            keys, values = fitted.keys, fitted.values
            if not self.fits:
                keys, values = (
                    [form.take(slice(head, head + 1)).rounded(entries[None])[0] for head, entries in enumerate(part)]
                    for part, form in zip((keys, values), forms, strict=True)
                )
            own = vars(fitted) | {"keys": keys, "values": values}
            return InFP8(**own, forms=forms)

        return to_pages


def in_hadamard_basis(context: Context, calibration: LossCurves | None = None) -> Fp8:
    """Make the method that turns keys and values by a Hadamard matrix before they are rounded, and takes from the keys
    what a bias gives all of them (`sculpt.turned`). A soft cap and a learned sink would notice the latter.
    """
    recording = context.recording
    notices = recording.soft_cap is not None or recording.sink_logits is not None
    turn = hadamard(recording.keys.shape[-1]).to(recording.keys.device)
    return Fp8(True, calibration, turn, None if notices else context.model.key_centres)
