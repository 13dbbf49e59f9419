"""Whatever fsspec knows besides local directories: buckets, SFTP, memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

from kvsculpt_vllm.store.names import DIGEST
from kvsculpt_vllm.store.places import Found, Place, partial_name, told

_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""What file systems call the time of writing."""


class RemotePlace(Place):
    """Nothing marks a file as used here: its age is that of its writing."""

    def __init__(self, file_system: AbstractFileSystem, path: str) -> None:
        self._fs = file_system
        with _as_os_error():
            self._root = str(file_system._strip_protocol(path)).rstrip("/")
        # A bucket has no renaming (fsspec would copy and delete), and needs none: what is put appears complete.
        self._renames = type(file_system).mv is not AbstractFileSystem.mv

    def files_in(self, folder: str) -> list[Found]:
        with _as_os_error():
            self._fs.invalidate_cache(self._at(folder))  # other servers write, too
            try:
                return list(self._found(self._fs.ls(self._at(folder), detail=True)))
            except FileNotFoundError:
                return []

    def files(self) -> Iterator[Found]:
        with _as_os_error():
            self._fs.invalidate_cache()
            infos = self._fs.find(self._root, detail=True) if self._exists() else {}
        for found in self._found(infos.values()):
            folder = found.path.rpartition("/")[0]
            if not folder or re.fullmatch(DIGEST, folder):
                yield found

    def folders(self) -> list[str]:
        if not self._renames:  # buckets have none
            return []
        with _as_os_error():
            infos = self._fs.ls(self._root, detail=True) if self._exists() else []
        names = [str(info["name"]).rpartition("/")[2] for info in infos if info["type"] == "directory"]
        return [name for name in names if re.fullmatch(DIGEST, name)]

    def read(self, path: str, end: int | None = None) -> bytes:
        with _as_os_error():
            if end is None:
                return self._fs.cat_file(self._at(path))
            return self._fs.cat_file(self._at(path), start=0, end=end)

    def write(self, path: str, data: bytes) -> None:
        with _as_os_error():
            if not self._renames:
                self._fs.pipe_file(self._at(path), data)
                return
            partial = self._at(partial_name(path))
            complete = False
            try:
                self._fs.makedirs(self._at(path).rpartition("/")[0], exist_ok=True)
                self._fs.pipe_file(partial, data)
                self._fs.mv(partial, self._at(path))
                complete = True
            finally:
                if not complete:
                    with suppress(OSError):  # the error that has brought us here is to be told
                        self._fs.rm_file(partial)

    def mark_used(self, path: str) -> None:
        return

    def remove(self, path: str) -> None:
        with _as_os_error(), suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def remove_if_empty(self, folder: str) -> None:
        with suppress(OSError), _as_os_error():  # not empty, or gone, or a bucket, which has none
            if self._renames:
                self._fs.rmdir(self._at(folder))

    def check(self, writable: bool) -> None:
        with _as_os_error():
            if writable and self._renames:
                self._fs.makedirs(self._root, exist_ok=True)
            self._exists()
        if writable:
            name = partial_name("check")  # no segment, should it stay
            with _as_os_error():
                self._fs.pipe_file(self._at(name), b"kvsculpt")
            self.remove(name)

    def _exists(self) -> bool:
        """Unlike `fs.exists` it does not take an error for an answer."""
        try:
            self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return False
        return True

    def _found(self, infos: Iterable[dict[str, Any]]) -> Iterator[Found]:
        prefix = f"{self._root}/" if self._root else ""
        for info in infos:
            name = str(info["name"])
            if info["type"] == "file" and name.startswith(prefix):
                yield Found(name[len(prefix) :], int(info["size"] or 0), _time_of(info))

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if self._root and path else self._root or path


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Each backend has exceptions of its own for what OSError says elsewhere."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(told(error)) from error


def _time_of(info: dict[str, Any]) -> float | None:
    """Seconds since 1970; None if the file system does not tell."""
    for key in _TIMES:
        match info.get(key):
            case datetime() as time:
                return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
            case int() | float() as seconds:
                return float(seconds)
            case str() as text:
                with suppress(ValueError):
                    return datetime.fromisoformat(text).timestamp()
    return None
