"""Where files can lie: what the store asks of a file system, and which one a URL means."""

from __future__ import annotations

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations, registry

from kvsculpt_vllm.store.names import DIGEST

_PARTIAL = re.compile(rf"(?:{DIGEST}/)?[\w.+-]+\.[0-9a-f]{{16}}\.partial", re.ASCII)


@dataclass(frozen=True)
class Found:
    """A file of a listing."""

    path: str  # relative to the place
    size: int  # bytes
    used: float | None  # seconds since 1970 when it was written, on a disk when last read; None if that is not told


class Place(ABC):
    """A directory of a file system, or a prefix of a bucket. Paths are relative to it, `<folder>/<file>`.

    Everything raises OSError where the file system does not do its part, and may be called by several threads.
    """

    @abstractmethod
    def files_in(self, folder: str) -> list[Found]:
        """The regular files of a folder; none if there is no such folder.

        Raises:
            FileNotFoundError: the place itself has vanished.
        """

    @abstractmethod
    def files(self) -> Iterator[Found]:
        """Those at the place and one folder deep."""

    @abstractmethod
    def folders(self) -> list[str]:
        """The folders that segments can be in, where the file system has such."""

    @abstractmethod
    def read(self, path: str, end: int | None = None) -> bytes | bytearray:
        """A file, or its first `end` bytes.

        Raises:
            FileNotFoundError: it is not there.
            IsADirectoryError: it is no regular file; symbolic links are not followed.
        """

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Make a file and its folder. It appears complete or not at all."""

    tells_use = False
    """Whether `mark_used` does anything."""

    @abstractmethod
    def mark_used(self, path: str) -> None:
        """Let the file's age begin anew, where the file system can do that."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a file; one that is not there any more is fine."""

    @abstractmethod
    def remove_if_empty(self, folder: str) -> None:
        """Remove a folder in which nothing is left."""

    @abstractmethod
    def check(self, writable: bool) -> None:
        """Read a listing; where `writable`, make the place if it is not there, and write and remove a file."""


def open_place(url: str) -> Place:
    """The place that a URL, or the path of a directory, means.

    Raises:
        ValueError: there is no such kind of file system, or the package that knows it is not installed.
    """
    from kvsculpt_vllm.store.local_place import LocalPlace
    from kvsculpt_vllm.store.remote_place import RemotePlace

    protocol = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::|:)", url)
    if not url or (protocol and protocol[2] == ":"):
        raise ValueError(f"{shown(url)!r} is neither a directory nor a URL such as s3://bucket/folder")
    if protocol and protocol[1] not in known_implementations and protocol[1] not in registry:
        raise ValueError(f"{shown(url)}: there is no protocol {protocol[1]}; {_FOR_EXAMPLE}")
    try:
        file_system, path = url_to_fs(url)
    except ImportError as error:
        needed = known_implementations[protocol[1]].get("err", "") if protocol else ""
        raise ValueError(f"{shown(url)}: {needed or error}, into the environment of the server") from error
    except Exception as error:  # whatever a file system raises that wants to connect, or misses a setting
        raise ValueError(f"{shown(url)} cannot be opened: {told(error)}") from error
    if isinstance(file_system, LocalFileSystem):
        return LocalPlace(path)
    return RemotePlace(file_system, path)


_FOR_EXAMPLE = "for example a directory, s3://bucket/folder (pip install s3fs), gs://bucket/folder (pip install gcsfs)"


def shown(url: str) -> str:
    """A URL without its password and without what follows a question mark, which may hold a key: for logs."""
    hidden = re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", url)
    return re.sub(r"(://[^?]*\?).*", r"\1***", hidden)


def told(error: BaseException) -> str:
    """An error in one line, with its kind where its message does not begin with a number of its own."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def partial_name(path: str) -> str:
    """A name of its own for a file that is being written, which no segment can have."""
    return f"{path}.{secrets.token_hex(8)}.partial"


def is_partial(path: str) -> bool:
    """Whether `partial_name` gave this name."""
    return _PARTIAL.fullmatch(path) is not None
