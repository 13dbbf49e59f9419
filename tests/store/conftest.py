"""Stores, and segments to put into them."""

import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from kvsculpt_vllm.store.store import Store
from stored import segment


@pytest.fixture(params=["directory", "memory", "renaming"])
def url(request, tmp_path: Path):
    """A local directory; a bucket; a file system that renames, by way of fsspec."""
    if request.param == "memory":
        root = f"memory://{uuid.uuid4().hex}"
        yield root
        fs, path = fsspec.core.url_to_fs(root)
        if fs.exists(path):
            fs.rm(path, recursive=True)
    else:
        yield str(tmp_path / "store") if request.param == "directory" else f"dir::file://{tmp_path}/store"


@pytest.fixture
def store(url: str) -> Store:
    """Empty, writable, without a bound."""
    store = Store(url, None, True)
    store.check()
    return store


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of a local store."""
    path = tmp_path / "local"
    Store(str(path), None, True).check()
    return path


@pytest.fixture
def file_of(directory: Path) -> Callable[[], Path]:
    """Writes a segment into the local store and says where its file is."""

    def write() -> Path:
        stored = segment()
        assert Store(str(directory), None, True).write(stored)
        return directory / stored.path

    return write
