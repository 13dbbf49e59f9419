"""What can be wrong with a disk: permissions, links, other things in the place of files; one that is full or gone."""

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys

import pytest

from kvsculpt_vllm.store.store import Store
from kvsculpt_vllm.store.unusable import Reason, Unusable
from stored import PARENT, name, same, segment


def names_in(directory):
    return [path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_nobody_else_may_read_a_prompts_segments_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        store = Store(str(tmp_path / "store"), None, True)
        store.check()
        store.write(segment())
    finally:
        os.umask(before)
    file = tmp_path / "store" / name().path(0, 1)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in file.parents[:2]] == [0o700] * 2


def test_a_directory_that_is_there_keeps_its_permissions(tmp_path):
    os.chmod(tmp_path, 0o750)
    Store(str(tmp_path), None, True).check()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o750
    assert names_in(tmp_path) == []


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def emptied(file):
    file.write_bytes(b"")


def flipped(file):
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)


def linked(file):
    file.rename(file.with_name("target"))
    file.symlink_to(file.with_name("target"))


def link_to_nothing(file):
    file.unlink()
    file.symlink_to("/nonexistent")


def directory_in_its_place(file):
    file.unlink()
    file.mkdir()


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def gone(file):
    file.unlink()


@pytest.mark.parametrize(
    ("harm", "reason", "listed"),
    [
        (cut, Reason.CUT_OFF, True),
        (emptied, Reason.CUT_OFF, True),
        (flipped, Reason.ALTERED, True),
        (linked, Reason.FOREIGN, False),
        (link_to_nothing, Reason.FOREIGN, False),
        (directory_in_its_place, Reason.FOREIGN, False),
        (pipe, Reason.FOREIGN, False),
        (gone, Reason.GONE, False),
    ],
)
def test_what_is_no_whole_file_is_unusable_and_does_not_come_again(directory, file_of, harm, reason, listed):
    harm(file_of())
    store = Store(str(directory), None, True)
    assert store.find(PARENT, 1) == ([name()] if listed else [])
    with pytest.raises(Unusable) as error:
        store.read(name(), 0, 1)
    assert error.value.reason == reason
    assert store.find(PARENT, 1) == []
    store.entries()
    store.sweep()
    assert store.write(segment(made="00000002"))  # in its place
    assert store.find(PARENT, 1) == [name(made="00000002")]


def test_a_reader_that_may_not_write_leaves_an_altered_file_and_does_not_find_it_again(directory, file_of):
    flipped(file_of())
    store = Store(str(directory), None, False)
    with pytest.raises(Unusable):
        store.read(name(), 0, 1)
    assert store.find(PARENT, 1) == []
    assert Store(str(directory), None, False).find(PARENT, 1) == [name()]


def test_a_folder_that_is_a_link_is_not_swept(directory, file_of, tmp_path):
    file = file_of()
    outside = tmp_path / "outside"
    file.parent.rename(outside)
    file.parent.symlink_to(outside)
    Store(str(directory), 1, True).sweep()
    assert (outside / file.name).exists()


@pytest.mark.parametrize("call", ["open", "fchmod", "write", "fsync", "replace"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_write_that_fails_leaves_nothing_and_tells_why(directory, monkeypatch, call, error):
    def fail(*args, **kwargs):
        raise OSError(error, os.strerror(error))

    store = Store(str(directory), None, True)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(OSError) as raised:
            store.write(segment())
    assert raised.value.errno == error
    assert names_in(directory) == []
    assert store.write(segment())


def test_a_limit_on_the_size_of_files_leaves_nothing(directory):
    script = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from stored import segment
from kvsculpt_vllm.store.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    Store(sys.argv[1], None, True).write(segment())
except OSError as error:
    print(error.errno)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    helpers = os.path.join(os.path.dirname(__file__), "..", "helpers")
    job = subprocess.run([sys.executable, "-c", script, directory, helpers], capture_output=True, text=True, check=True)
    assert job.stdout == f"{errno.EFBIG}\n"
    assert names_in(directory) == []


def test_a_short_write_goes_on(directory, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:100])))
    readv = os.readv
    monkeypatch.setattr(os, "readv", lambda descriptor, buffers: readv(descriptor, [buffers[0][:100]]))
    store = Store(str(directory), None, True)
    store.write(segment())
    assert same(store.read(name(), 0, 1), segment())


def test_a_directory_that_vanishes_is_an_error_and_is_not_made_anew(directory, file_of):
    file_of()
    store = Store(str(directory), None, True)
    assert store.find(PARENT, 1)
    shutil.rmtree(directory)  # a disk that is no longer mounted
    for work in (lambda: store.write(segment("b")), lambda: store.find(PARENT, 1), store.entries, store.sweep):
        with pytest.raises(FileNotFoundError, match="has vanished"):
            work()
    assert not directory.exists()


def test_a_folder_that_a_sweep_removes_before_the_file_is_there_is_made_again(directory, monkeypatch):
    mkdir, made = os.mkdir, []

    def mkdir_and_lose(path, mode=0o777):
        mkdir(path, mode)
        made.append(path)
        if len(made) == 1:
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", mkdir_and_lose)
    monkeypatch.setattr(os, "chmod", lambda path, mode: None)
    store = Store(str(directory), None, True)
    assert store.write(segment())
    assert len(made) == 2
    assert store.find(PARENT, 1) == [name()]


def test_start_up_tells_what_is_wrong_with_the_place(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not there"):
        Store(str(tmp_path / "none"), None, False).check()
    (tmp_path / "file").write_text("x")
    for url in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be written to"):
            Store(str(url), None, True).check()

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match=r"Read-only file system.*let the server's user read and write there"):
        Store(str(tmp_path), None, True).check()
