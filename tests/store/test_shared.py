"""Servers that are killed at any moment, and servers that write and sweep one store at the same time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvsculpt_vllm.store.file import encode
from kvsculpt_vllm.store.places import is_partial
from kvsculpt_vllm.store.store import Store
from stored import PARENT, segment

HELPERS = str(Path(__file__).parents[1] / "helpers")

KILLED = """
import os, signal, sys
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
sys.path.insert(0, sys.argv[1])
from stored import segment
from kvsculpt_vllm.store.store import Store

url, calls = sys.argv[2], [
    *((os, name) for name in ("mkdir", "chmod", "open", "fchmod", "write", "fsync", "close", "replace", "unlink")),
    *((LocalFileSystem, name) for name in ("makedirs", "_open", "mv", "rm_file")),
    (LocalFileOpener, "write"),
]
store, better, left = Store(url, None, True), segment(effort="balanced", made="00000002"), 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def traced(name, real):
    def call(target, *args, **kwargs):
        global left
        left -= 1
        last = not left
        if last and not after:
            if name == "write":  # a part of it
                real(target, bytes(args[0])[:77])
                getattr(target, "flush", int)()
            die()
        try:
            return real(target, *args, **kwargs)
        finally:
            if last:
                die()
    return call

for step in range(1, 100):
    for after in (False, True):
        child = os.fork()
        if not child:
            left = step
            for owner, name in calls:
                setattr(owner, name, traced(name, getattr(owner, name)))
            store.write(better)
            os._exit(7)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = store.find(better.name.parent, 1)
        print(step, after, killed, *[one.effort for one in found], flush=True)
        for one in found:
            store.read(one, 0, 1)
        if not killed:
            raise SystemExit
        store.remove(better.name)
        if sys.argv[3] == "replace":
            store.write(segment())
"""
"""Writes in a child that is killed before, and then after, its n-th call to the operating system, for every n."""


@pytest.mark.parametrize("kind", ["new", "replace"])
@pytest.mark.parametrize("scheme", ["{}", "dir::file://{}"])
def test_a_server_that_is_killed_while_it_writes_leaves_a_whole_file_or_none(tmp_path, scheme, kind):
    url, directory = scheme.format(tmp_path), tmp_path
    if url.startswith("dir::"):  # fsspec takes such a URL for a path within itself
        directory = tmp_path / tmp_path.relative_to("/")
    store = Store(url, None, True)
    if kind == "replace":
        store.write(segment())
    command = [sys.executable, "-c", KILLED, HELPERS, url, kind]
    job = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert job.returncode == 0, job.stderr
    steps = [line.split() for line in job.stdout.splitlines()]
    outcomes = [step[3:] for step in steps]
    assert all(step[2] == "True" for step in steps[:-1])
    assert steps[-1][2:] == ["False", "balanced"]  # not killed any more
    assert len(steps) > 8, steps
    if kind == "new":
        assert {tuple(found) for found in outcomes} == {(), ("balanced",)}
    else:  # the worse one stays until the better one is there
        assert {tuple(found) for found in outcomes} >= {("fast",), ("balanced", "fast"), ("balanced",)}
        assert () not in {tuple(found) for found in outcomes}
    left = [path for path in directory.rglob("*") if path.is_file() and is_partial(f"{path.relative_to(directory)}")]
    assert left
    for path in left:
        os.utime(path, (0, 0))
    store.sweep()
    assert not any(path.exists() for path in left)
    assert store.find(PARENT, 1)[0].effort == "balanced"


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from stored import PARENT, segment
from kvsculpt_vllm.store.store import Store
from kvsculpt_vllm.store.unusable import Reason, Unusable

url, size, seed, until = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), time.time() + float(sys.argv[5])
store, writes, reads = Store(url, size, True), 0, 0
i = 0
while time.time() < until:
    i += 1
    writes += store.write(segment(f"{i % 7}", error=1 / (i + seed), made=f"{2 * i + seed:08x}"))
    if i % 5 == 0:
        store.sweep()
    for name in store.find(PARENT, 1):
        try:
            assert store.read(name, 0, 1).name == name
            reads += 1
        except Unusable as error:
            assert error.reason == Reason.GONE, error
print(writes, reads)
"""


def test_two_servers_that_write_and_sweep_one_store_do_each_other_no_harm(tmp_path):
    size = len(encode(segment()))
    arguments = [[HELPERS, tmp_path, f"{4 * size}", seed, "1"] for seed in "01"]
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for given in arguments
    ]
    for job in jobs:
        output, errors = job.communicate(timeout=60)
        assert job.returncode == 0, errors
        assert all(int(count) > 10 for count in output.split()), output
    store = Store(str(tmp_path), 4 * size, True)
    store.sweep()
    entries = store.entries()
    assert 0 < len(entries) <= 4
    assert len({entry.name.key for entry in entries}) == len(entries)
    assert all(store.read(entry.name, 0, 1).name == entry.name for entry in entries)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == len(entries)
