"""Engines for tests, each in its own process."""

import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryFile
from threading import Timer

import pytest

from kvsculpt_vllm.models import fast_dtype

JOB = Path(__file__).with_name("engine_job.py")


SECONDS = 600
MOST = 3
"""Engines that stay for other jobs: starting one takes longer than most jobs, and each holds a gigabyte."""


class Engine:
    """A process that runs the jobs of one engine, or of a script that answers a line with a line."""

    def __init__(self, script: Path = JOB, *arguments: str) -> None:
        self._log = TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def run(self, job: str) -> dict:
        """The job's result."""
        timer = Timer(SECONDS, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(job + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            self._process.wait()
            self._log.seek(0)
            pytest.fail(f"the engine ended with {self._process.returncode}:\n{self._log.read()[-6000:]}")
        return json.loads(line)

    def stop(self) -> None:
        """Let it end."""
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="session")
def run_engine(model_path):
    """Run a job of `engine_job.py` with the embedded model; equal jobs run once a session."""
    results, engines = {}, OrderedDict()

    def run(**job):
        defaults = {"model": str(model_path), "dtype": fast_dtype(), "block_size": 32, "max_model_len": 2048}
        job["engine"] = defaults | job["engine"]
        text = json.dumps(job, sort_keys=True)
        if text not in results:
            faults = any(request.get("fault") for batch in job["batches"] for request in batch)
            special = job.keys() - {"engine", "batches", "abort_after"}
            # A prefix cache remembers what ran before, and what is special hardly comes twice.
            alone = faults or special or job["engine"].get("enable_prefix_caching", True)
            key = text if alone else json.dumps(job["engine"], sort_keys=True)
            if key not in engines:
                engines[key] = Engine()
            results[text] = engines[key].run(text)
            engines.move_to_end(key)
            if alone:
                engines.pop(key).stop()
            elif len(engines) > MOST:
                engines.popitem(last=False)[1].stop()
        return results[text]

    yield run
    for engine in engines.values():
        engine.stop()
