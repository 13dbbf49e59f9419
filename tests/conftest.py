"""Fixtures that several folders share."""

from pathlib import Path

import pytest

from kvsculpt_vllm.models import prepare


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The embedded 135M model, prepared if needed."""
    return prepare("smollm2-135m").resolve()
