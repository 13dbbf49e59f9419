"""Start `vllm serve` on a free port and stop it again: for the demo, benchmarks and tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

START_UP_SECONDS = 300
STOP_SECONDS = 30
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
"""The command `vllm`, also where vLLM is in a folder of PYTHONPATH and has no script."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    address: str  # http://host:port
    log: Path  # what it prints
    process: subprocess.Popen


@contextmanager
def serve(model: Path, *flags: str) -> Iterator[Server]:
    """`vllm serve MODEL FLAGS…` on a free local port, with our HTTP routes.

    Raises:
        RuntimeError: it does not get ready; the message has the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *flags]
    with NamedTemporaryFile(prefix="kvsculpt-serve-", suffix=".log", delete=False) as log:
        # A session of its own: vLLM's worker processes must stop with it.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", Path(log.name), process)
    try:
        _wait_until_ready(process, server)
        yield server
    finally:
        _stop(process)


def read_metrics(address: str, timeout: float) -> list[Metric]:
    """What a server's `/metrics` tells; `timeout` in seconds.

    Raises:
        OSError: it does not answer.
    """
    with urllib.request.urlopen(f"{address}/metrics", timeout=timeout) as response:
        return list(text_string_to_metric_families(response.read().decode()))


def _wait_until_ready(process: subprocess.Popen, server: Server) -> None:
    deadline = time.monotonic() + START_UP_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{server.address}/health", timeout=2).close()
            return
        except OSError:  # nobody listens yet
            time.sleep(0.5)
    why = "ended" if process.poll() is not None else f"was not ready after {START_UP_SECONDS} s"
    raise RuntimeError(f"vllm serve {why}; the end of its log, {server.log}:\n{server.log.read_text()[-4000:]}")


def _stop(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):  # nobody is left
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        # Whoever outlives the server, such as an engine in a long step, would keep its cores and its memory.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
