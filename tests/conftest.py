"""Fixtures that several folders share."""

from pathlib import Path

import pytest
import torch

from kvsculpt_vllm.models import prepare


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The embedded 135M model, prepared if needed."""
    return prepare("smollm2-135m").resolve()


@pytest.fixture(scope="module")
def one_thread():
    """On a busy machine two threads that wait for each other make tiny products ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
