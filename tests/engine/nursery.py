"""Forks engines from a process that has imported vLLM, which takes longer than most of the jobs that they run.

Not a test module: `conftest.py` calls it with `plain` or `interpreted` (Triton's interpreter is chosen before anything
is imported) and the number of a socket. Over the socket come three files at a time: what the next engine reads jobs
from, writes results to, and logs to. The answer is the number of its process.
"""

import gc
import os
import signal
import socket
import sys

import engine_job  # first: it sets what vLLM reads when it is imported

from interpreter import interpret_triton


def become(files: list[int]) -> None:
    """Take the place of a process that was started with these files."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)


def import_what_engines_need() -> None:
    """All of it, but for what depends on a job."""
    from vllm import LLM, SamplingParams  # noqa: F401
    from vllm.model_executor.models import llama  # noqa: F401
    from vllm.v1.worker import cpu_worker  # noqa: F401

    from kvsculpt_vllm.engine.scheduler import scheduler  # noqa: F401
    from kvsculpt_vllm.engine.worker import worker_cpu  # noqa: F401


def main() -> None:
    kind, number = sys.argv[1:]
    orders = socket.socket(fileno=int(number))
    if kind == "interpreted":
        interpret_triton()
    import_what_engines_need()
    gc.collect()
    gc.freeze()  # else every engine would copy what collections touch
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    while True:
        message, files, _, _ = socket.recv_fds(orders, 1, 3)
        if not message:  # the tests are over
            return
        if (engine := os.fork()) == 0:
            orders.close()
            become(files)
            return engine_job.main()
        for file in files:
            os.close(file)
        orders.send(f"{engine}\n".encode())


if __name__ == "__main__":
    main()
