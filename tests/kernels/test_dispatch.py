"""The solver on kernels gives what it gives on their twins."""

import pytest
import torch

from kvsculpt_vllm.evaluation.methods import METHODS
from kvsculpt_vllm.evaluation.methods.base import OfContext
from kvsculpt_vllm.kernels.dispatch import VARIABLE, use_triton
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import compress
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.options import METHODS as OURS
from kvsculpt_vllm.sculpt.problem import Problems

BLOCK, PAGES, SINKS, HEADS, QUERIES, SIZE = 8, 6, 3, 3, 90, 16
PLAN = PagePlan(block_size=BLOCK, span_pages=PAGES, total=3 * HEADS, sinks=SINKS)
EFFORT = Effort(positions=0, pilot_positions=30, fit_positions=QUERIES, key_steps=5)


def make_problems(device, soft_cap):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    queries = normal(HEADS, QUERIES, SIZE) + normal(HEADS, 1, SIZE)
    entries = PAGES * BLOCK - SINKS
    tensors = {
        "queries": queries,
        "keys": normal(HEADS, entries, SIZE),
        "values": normal(HEADS, entries, SIZE),
        "retained_lse": normal(HEADS, QUERIES) + 1.0,
        "retained_out": normal(HEADS, QUERIES, SIZE),
        "held_out": torch.arange(QUERIES) % 5 == 4,
    }
    return Problems(
        **{name: tensor.to(device) for name, tensor in tensors.items()}, scale=SIZE**-0.5, soft_cap=soft_cap
    )


@pytest.mark.parametrize(
    ("method", "soft_cap"), [("select", None), ("select_fit", None), ("sculpt", None), ("sculpt", 1.5)]
)
def test_both_give_the_same_budgets_and_nearly_the_same_entries(method, soft_cap, device, monkeypatch):
    problems, results = make_problems(device, soft_cap), {}
    for choice in ("triton", "torch"):
        monkeypatch.setenv(VARIABLE, choice)
        results[choice] = compress(problems, PLAN, method, "adaptive", EFFORT)
    kernel, twin = results["triton"], results["torch"]
    assert kernel.pages == twin.pages
    torch.testing.assert_close(kernel.start_error, twin.start_error, rtol=3e-3, atol=1e-6)  # a GPU's TF32
    torch.testing.assert_close(kernel.error, twin.error, rtol=2e-2, atol=1e-5)
    if method != "sculpt":  # line searches amplify rounding
        for mine, theirs in zip(kernel.values, twin.values, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


# Ours are tested above. The paper's hundreds of steps are those of sculpt, and take an interpreter a minute.
PEERS = sorted(
    name for name, peer in METHODS.items() if not isinstance(peer, OfContext) and name not in (*OURS, "kvsculpt_paper")
)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_of_the_evaluation_runs_on_kernels(name, device, monkeypatch):
    problems, errors = make_problems(device, None), {}
    for choice in ("triton", "torch"):
        monkeypatch.setenv(VARIABLE, choice)
        errors[choice] = METHODS[name](problems, PLAN, "uniform", EFFORT)(PLAN).error
    torch.testing.assert_close(errors["triton"], errors["torch"], rtol=2e-2, atol=1e-5)


def test_kernels_run_where_the_tensors_are_unless_said_otherwise(device, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert use_triton(torch.zeros(1, device=device)) == (device.type == "cuda")
    monkeypatch.setenv(VARIABLE, "torch")
    assert not use_triton(torch.zeros(1, device=device))
    monkeypatch.setenv(VARIABLE, "both")
    with pytest.raises(ValueError, match="KVSCULPT_KERNELS: 'both' given"):
        use_triton(torch.zeros(1))
