"""Engines for tests, each in its own process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
