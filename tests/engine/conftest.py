"""Engines for tests, each in its own process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

JOB = Path(__file__).with_name("engine_job.py")


@pytest.fixture(scope="session")
def run_engine(model_path):
    """Run a job of `engine_job.py` with the embedded model; equal jobs run once a session."""
    results = {}

    def run(**job):
        job["engine"] = {"model": str(model_path), "block_size": 32, "max_model_len": 2048, **job["engine"]}
        text = json.dumps(job, sort_keys=True)
        if text not in results:
            done = subprocess.run([sys.executable, str(JOB)], input=text, capture_output=True, text=True, timeout=400)
            assert done.returncode == 0, done.stderr[-4000:]
            results[text] = json.loads(done.stdout)
        return results[text]

    return run


@pytest.fixture(scope="session")
def first_layers_path(model_path, tmp_path_factory):
    """The embedded model's first four layers as a model of its own: Triton's interpreter takes seconds a layer."""
    layers, path = 4, tmp_path_factory.mktemp("first_layers")
    for file in model_path.glob("*.json"):
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
