"""Engines for tests, each in its own process."""

import json
import os
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from threading import Timer

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from random_models import SMALL, save

NURSERY = Path(__file__).with_name("nursery.py")

SECONDS = 600
MOST = 3
"""Engines that stay for other jobs: starting one takes longer than most jobs, and each holds a gigabyte."""

Process = subprocess.Popen | psutil.Process
Start = Callable[[int, int, int], Process]
"""Starts a process that reads from the first file, writes to the second and logs to the third."""


class Engine:
    """A process that answers a line, a job, with a line."""

    def __init__(self, start: Start) -> None:
        self._log = TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        its_jobs, jobs = os.pipe()
        results, its_results = os.pipe()
        self._process = start(its_jobs, its_results, self._log.fileno())
        os.close(its_jobs)
        os.close(its_results)
        self._jobs, self._results = os.fdopen(jobs, "w"), os.fdopen(results)

    def run(self, job: str) -> dict:
        """The job's result."""
        with self._killed_after(SECONDS):
            self._jobs.write(job + "\n")
            self._jobs.flush()
            line = self._results.readline()
        if not line:
            self._log.seek(0)
            pytest.fail(f"the engine has ended:\n{self._log.read()[-6000:]}")
        return json.loads(line)

    def stop(self) -> None:
        """Let it end."""
        with self._killed_after(60):
            self._jobs.close()
            assert not self._results.read()  # nobody has the file any more, so that it ended

    @contextmanager
    def _killed_after(self, seconds: float) -> Iterator[None]:
        timer = Timer(seconds, self._process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def script(*command: str | Path) -> Start:
    """A process of its own for a script with its arguments."""

    def start(jobs: int, results: int, log: int) -> Process:
        return subprocess.Popen([sys.executable, *map(str, command)], stdin=jobs, stdout=results, stderr=log)

    return start


class Nursery:
    """A process of `nursery.py`, which starts engines."""

    def __init__(self, kind: str) -> None:
        self._orders, its_orders = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, str(NURSERY), kind, str(its_orders.fileno())], pass_fds=[its_orders.fileno()]
        )
        its_orders.close()

    def start(self, jobs: int, results: int, log: int) -> Process:
        """As `Start`."""
        socket.send_fds(self._orders, [b"!"], [jobs, results, log])
        return psutil.Process(int(self._orders.recv(100)))

    def stop(self) -> None:
        """Start none any more."""
        self._orders.close()
        self._process.wait(60)


@pytest.fixture(scope="session")
def small_path(model_path, tmp_path_factory):
    """A Llama of two layers with random weights, and a real tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True)
    return save(LlamaForCausalLM(config), tmp_path_factory.mktemp("small"), model_path)


@pytest.fixture(scope="session")
def run_engine(small_path):
    """Run a job of `engine_job.py`; equal jobs run once a session. Where a job names no model it runs a small one,
    in float32, in which other kernels' rounding changes no token.
    """
    small = {"model": str(small_path), "dtype": "float32", "kv_cache_memory_bytes": 1 << 27}
    results, engines, nurseries = {}, OrderedDict(), {}

    def start(job: dict) -> Engine:
        kind = "interpreted" if job.get("v2") or job.get("gpu_path") else "plain"
        if kind not in nurseries:
            nurseries[kind] = Nursery(kind)
        return Engine(nurseries[kind].start)

    def run(**job):
        whose = {} if "model" in job["engine"] else small
        job["engine"] = {"block_size": 32, "max_model_len": 2048} | whose | job["engine"]
        text = json.dumps(job, sort_keys=True)
        if text not in results:
            faults = any(request.get("fault") for batch in job["batches"] for request in batch)
            special = job.keys() - {"engine", "batches", "abort_after"}
            # A prefix cache remembers what ran before, and what is special hardly comes twice.
            alone = faults or special or job["engine"].get("enable_prefix_caching", True)
            key = text if alone else json.dumps(job["engine"], sort_keys=True)
            if key not in engines:
                engines[key] = start(job)
            results[text] = engines[key].run(text)
            engines.move_to_end(key)
            if alone:
                engines.pop(key).stop()
            elif len(engines) > MOST:
                engines.popitem(last=False)[1].stop()
        return results[text]

    yield run
    for process in (*engines.values(), *nurseries.values()):
        process.stop()
