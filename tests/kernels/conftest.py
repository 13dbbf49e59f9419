"""Kernels against their twins: compiled where there is a GPU, interpreted where `make test` says TRITON_INTERPRET=1."""

import os

import pytest
import torch

from interpreter import interpret_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    interpret_triton()  # before vLLM is imported, whose kernels the self-test compares with ours
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def pytest_collection_modifyitems(items):
    if DEVICE == "cpu" and not INTERPRETED:
        skip = pytest.mark.skip(reason="no GPU: run with TRITON_INTERPRET=1, as `make test` does")
        for item in items:
            if "tests/kernels" in str(item.path):
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="module")
def tiny_tensors(one_thread):
    """All tests here compute with one thread: the interpreter's tensors are tiny."""


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture
def poison_empty_memory():
    """Memory that nobody has written holds what is no number, or the largest one of integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # matrix products on a GPU are none, which does not matter
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def _problem(batch, num_queries, m, head_size, sizes, device=DEVICE, seed=0):
    """A teacher of a few more entries than the m compressed ones, and retained entries for half of the mass or so."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries = normal(batch, num_queries, head_size) * head_size**-0.5
    keys, values = normal(batch, m, head_size), normal(batch, m, head_size)
    out, shift = normal(batch, num_queries, head_size) * 0.3, normal(batch, num_queries) * 0.3 + 3.0
    retained_mass = torch.rand(batch, num_queries, generator=generator, dtype=torch.float64)
    retained_sum = retained_mass[..., None] * normal(batch, num_queries, head_size)
    arguments = [queries, shift, out, retained_mass, retained_sum, out.square().sum(-1).mean(-1), keys, values]
    return [tensor.to(device) for tensor in arguments], torch.tensor(sizes, device=device)


@pytest.fixture
def make_problem():
    """Arguments of the loss (float64), and the sizes, of ragged problems."""
    return _problem
