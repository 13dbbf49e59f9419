"""A directory: a local disk, or NFS and the like. Segments are prompts' content, so nobody else may read them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress

from kvsculpt_vllm.store.names import DIGEST
from kvsculpt_vllm.store.places import Found, Place, partial_name

FILE_MODE, DIRECTORY_MODE = 0o600, 0o700

# A link could lead anywhere, and a named pipe would keep its reader for ever.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class LocalPlace(Place):
    """What fsspec's file system does not do: permissions, links that are not followed, use times, data that has reached
    the disk before its name is there.
    """

    tells_use = True

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(root)
        self._was_there = False

    def files_in(self, folder: str) -> list[Found]:
        try:
            found = list(self._files(folder))
        except FileNotFoundError:
            self._raise_if_vanished()
            return []
        self._was_there = True
        return found

    def files(self) -> Iterator[Found]:
        for folder in ("", *self.folders()):
            with suppress(FileNotFoundError):  # another server has just emptied it
                yield from self._files(folder)

    def folders(self) -> list[str]:
        try:
            with os.scandir(self._root) as inside:
                self._was_there = True
                names = [entry.name for entry in inside if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            self._raise_if_vanished()
            return []
        return [name for name in names if re.fullmatch(DIGEST, name)]

    def read(self, path: str, end: int | None = None) -> bytearray:
        try:
            descriptor = os.open(self._at(path), _READ)
        except OSError as error:
            if os.path.islink(self._at(path)):
                raise IsADirectoryError(f"{path} is a symbolic link") from error
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(f"{path} is no regular file")
            data = bytearray(status.st_size if end is None else min(end, status.st_size))
            done = 0
            with memoryview(data) as view:
                while done < len(data) and (count := os.readv(descriptor, [view[done:]])):
                    done += count
        finally:
            os.close(descriptor)
        del data[done:]  # it has become shorter meanwhile
        return data

    def write(self, path: str, data: bytes) -> None:
        partial = self._at(partial_name(path))
        descriptor = self._create(partial)
        complete = False
        try:
            try:
                os.fchmod(descriptor, FILE_MODE)  # the umask may have taken some of it
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)  # NFS tells of a full disk only now
            finally:
                os.close(descriptor)
            os.replace(partial, self._at(path))
            complete = self._was_there = True
        finally:
            if not complete:
                with suppress(OSError):  # the error that has brought us here is to be told
                    os.unlink(partial)

    def mark_used(self, path: str) -> None:
        with suppress(OSError):  # of another user, or a read-only mount: its age goes on, and it was read all the same
            os.utime(self._at(path))

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._at(path))

    def remove_if_empty(self, folder: str) -> None:
        with suppress(OSError):  # not empty, or gone
            os.rmdir(self._at(folder))

    def check(self, writable: bool) -> None:
        if writable and not os.path.isdir(self._root):
            os.makedirs(os.path.dirname(self._root), exist_ok=True)
            self._make_directory(self._root)
        with os.scandir(self._root) as inside:
            next(inside, None)
        self._was_there = True
        if writable:
            name = partial_name("check")  # no segment, should it stay
            self.write(name, b"kvsculpt")
            self.remove(name)

    def _files(self, folder: str) -> Iterator[Found]:
        with os.scandir(self._at(folder)) as inside:
            for entry in inside:
                with suppress(FileNotFoundError):  # removed while we look
                    if entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        path = f"{folder}/{entry.name}" if folder else entry.name
                        yield Found(path, status.st_size, status.st_mtime)

    def _create(self, path: str) -> int:
        """A new file; its folder is made, and made again if a sweep has just removed it, being empty."""
        for _ in range(10):
            with suppress(FileNotFoundError):
                return os.open(path, _CREATE, FILE_MODE)
            if not os.path.isdir(self._root):
                self._raise_if_vanished()
                os.makedirs(os.path.dirname(self._root), exist_ok=True)
                self._make_directory(self._root)
            self._make_directory(os.path.dirname(path))
        return os.open(path, _CREATE, FILE_MODE)

    def _make_directory(self, path: str) -> None:
        with suppress(FileExistsError):
            os.mkdir(path, DIRECTORY_MODE)
            os.chmod(path, DIRECTORY_MODE)  # the umask may have taken some of it

    def _raise_if_vanished(self) -> None:
        """A directory that was there and is not is most likely a disk that is not mounted: it must not be made anew."""
        if os.path.isdir(self._root):
            self._was_there = True
        elif self._was_there:
            raise FileNotFoundError(f"{self._root} has vanished")

    def _at(self, path: str) -> str:
        return os.path.join(self._root, path) if path else self._root
