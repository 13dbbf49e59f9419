"""Fixtures that several folders share."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file

from kvsculpt_vllm.models import prepare

# Nothing is timed: two busy processes slow each other tenfold where this runs.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The embedded 135M model, prepared if needed."""
    return prepare("smollm2-135m").resolve()


@pytest.fixture(scope="session")
def first_layers_path(model_path, tmp_path_factory):
    """The embedded model's first two layers as a model of its own, for what takes seconds a layer."""
    layers, path = 2, tmp_path_factory.mktemp("first_layers")
    for file in model_path.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, path)
    config = json.loads((model_path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    kept = {
        name: tensor
        for name, tensor in load_file(model_path / "model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def one_thread():
    """On a busy machine two threads that wait for each other make tiny products ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
