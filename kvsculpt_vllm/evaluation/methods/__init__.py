"""The methods that can be compared: ours and its peers, one small file each.

A method takes a request's problems, its pages, the budget rule (uniform, adaptive) and the effort, and returns what
compresses to any number of pages; one that is `OfContext` is made for a context first. To add one, write its file and
name it in `METHODS`.
"""

from __future__ import annotations

from functools import partial

from kvsculpt_vllm.evaluation.methods.attention_matching import (
    attention_matching,
    attention_matching_omp,
    attention_matching_our_budgets,
)
from kvsculpt_vllm.evaluation.methods.base import Method, OfContext, surveyed
from kvsculpt_vllm.evaluation.methods.expected_attention import expected_attention
from kvsculpt_vllm.evaluation.methods.fp8 import Fp8, in_hadamard_basis
from kvsculpt_vllm.evaluation.methods.keydiff import keydiff
from kvsculpt_vllm.evaluation.methods.kvsculpt_paper import kvsculpt_paper
from kvsculpt_vllm.evaluation.methods.kvzip import kvzip
from kvsculpt_vllm.evaluation.methods.random_choice import random_choice
from kvsculpt_vllm.evaluation.methods.snapkv import snapkv
from kvsculpt_vllm.sculpt.loss_curves import LossCurves
from kvsculpt_vllm.sculpt.options import METHODS as OURS

METHODS: dict[str, Method | OfContext] = {
    **{name: surveyed(name) for name in OURS},
    "attention_matching": attention_matching,
    "attention_matching_omp": attention_matching_omp,
    "attention_matching_our_budgets": attention_matching_our_budgets,
    "expected_attention": expected_attention,
    "keydiff": keydiff,
    "kvsculpt_paper": kvsculpt_paper,
    "kvzip": OfContext(kvzip),
    "sculpt_fp8": Fp8(fits=True),
    "sculpt_hadamard_fp8": OfContext(in_hadamard_basis),
    "sculpt_rounded_fp8": Fp8(fits=False),
    "snapkv": snapkv,
    "random": random_choice,
}


def calibrated(curves: LossCurves) -> dict[str, Method | OfContext]:
    """Those of the methods that follow a calibration, with one."""
    return {
        "sculpt": surveyed("sculpt", calibration=curves),
        "sculpt_rounded_fp8": Fp8(fits=False, calibration=curves),
        "sculpt_fp8": Fp8(fits=True, calibration=curves),
        "sculpt_hadamard_fp8": OfContext(partial(in_hadamard_basis, calibration=curves)),
    }
