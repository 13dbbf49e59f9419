"""A store that cannot be used stops the start-up, with cause and cure, and nobody's password."""

import errno
import os
from types import SimpleNamespace

import pytest
from fsspec.registry import known_implementations, register_implementation

from kvsculpt_vllm.config import CompressionConfig, ConfigError
from kvsculpt_vllm.engine.startup.store_setting import check_store
from kvsculpt_vllm.store.local_place import LocalPlace

PASSWORD = "pass/w@rd"


def check(store, prefix_caching=True, **settings):
    config = CompressionConfig(method="sculpt", store=str(store), **settings)
    check_store(config, SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching)))


def refused(*args, **settings):
    """The message of the refusal."""
    with pytest.raises(ConfigError) as caught:
        check(*args, **settings)
    assert caught.value.option == "--kv-compression-store"
    return str(caught.value)


def test_a_store_is_made_and_left_as_it_is(tmp_path):
    check("none", prefix_caching=False)
    check(tmp_path / "deep" / "store")
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "store"]
    assert list((tmp_path / "deep" / "store").iterdir()) == []
    check(tmp_path / "deep" / "store", store_mode="read")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "neither a directory nor a URL"),
        ("s3:bucket/folder", "neither a directory nor a URL"),
        ("nosuch://bucket", "there is no protocol nosuch; for example a directory, s3://bucket/folder"),
    ],
)
def test_what_is_no_url_is_told(url, told):
    assert told in refused(url)


def test_a_missing_package_is_told_by_its_name(monkeypatch):
    lacking = {"class": "no_such_package.FileSystem", "err": "Install no_such_package to use it"}
    monkeypatch.setitem(known_implementations, "lacking", lacking)
    told = refused("lacking://bucket/folder")
    assert "Install no_such_package to use it, into the environment of the server" in told


def test_it_needs_prefix_caching(tmp_path):
    told = refused(tmp_path / "store", prefix_caching=False)
    assert "none together with --no-enable-prefix-caching" in told
    assert not (tmp_path / "store").exists()


def test_a_directory_that_is_only_read_has_to_be_there(tmp_path):
    told = refused(tmp_path / "store", store_mode="read")
    assert "is not there" in told and "or let the store be written to" in told
    assert not (tmp_path / "store").exists()
    (tmp_path / "file").write_text("no directory")
    assert "let the server's user read there" in refused(tmp_path / "file", store_mode="read")


def test_a_directory_that_cannot_be_written_to_may_still_be_read(tmp_path, monkeypatch):
    def write(self, path, data):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(LocalPlace, "write", write)
    told = refused(tmp_path)
    assert "cannot be written to" in told and "Read-only file system" in told
    assert "let the server's user read and write there" in told
    check(tmp_path, store_mode="read")


def test_no_message_has_the_password(monkeypatch):
    def fails(**kwargs):
        raise RuntimeError("no route to host")

    register_implementation("unreachable", fails, clobber=True)
    lacking = {"class": "no_such_package.FileSystem", "err": "Install no_such_package"}
    monkeypatch.setitem(known_implementations, "lacking", lacking)
    part = PASSWORD.replace("/", "%2F")  # as a URL has it; people forget to do so for @
    for protocol in ("nosuch", "lacking", "unreachable"):
        told = refused(f"{protocol}://user:{part}@host/folder")
        assert f"{protocol}://user:***@host/folder" in told
        assert "pass" not in told and "rd@" not in told
    told = refused(f"s3://user:{part}@host/folder", prefix_caching=False)
    assert "pass" not in told and "rd@" not in told and "***" in told
