"""`kvsculpt store`: what is listed, what is told to be unusable, and what is removed."""

import json
import os
import time

import pytest
from typer.testing import CliRunner

from kvsculpt_vllm.cli import app
from kvsculpt_vllm.store.store import Store
from stored import name, segment


def run(*arguments, **settings):
    return CliRunner().invoke(app, ["store", *map(str, arguments)], **settings)


@pytest.fixture
def full(tmp_path):
    """A directory with two segments: `a` of two ranks, and `b`, which misses one, used ten days ago."""
    store = Store(str(tmp_path), None, True)
    for stored in (segment("a", 0, 2), segment("a", 1, 2), segment("b", 0, 2, tokens=4096)):
        store.write(stored)
    then = time.time() - 10 * 86400
    os.utime(tmp_path / name("b", tokens=4096).path(0, 2), (then, then))
    return tmp_path


def keys(directory):
    return {entry.name.key for entry in Store(str(directory), None, False).entries()}


def test_ls_shows_what_goes_first_first(full):
    result = run("ls", full, env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    first, second = [line for line in lines if "fast" in line]
    assert name("b").key.hex()[:12] in first
    assert "4,096" in first
    assert "1 of 2" in first
    assert "240.0" in first  # hours
    assert name("a").key.hex()[:12] in second
    assert lines[-1].startswith("2 segments, ")


def test_ls_gives_json(full):
    result = run("ls", full, "--json")
    told = json.loads(result.output)
    assert [entry["complete"] for entry in told] == [False, True]
    assert told[1] | {"used": 0, "bytes": 0} == {
        "key": name("a").key.hex(),
        "parent": name("a").parent.hex(),
        "tokens": 2048,
        "blocks": 13,
        "effort": "fast",
        "error": 0.0123,
        "made": "00c0ffee",
        "ranks": 2,
        "complete": True,
        "bytes": 0,
        "used": 0,
    }
    assert told[1]["bytes"] == sum((full / name("a").path(rank, 2)).stat().st_size for rank in (0, 1))


def test_show_tells_what_files_say_of_themselves(full):
    (full / name("a").path(1, 2)).write_bytes(b"")
    result = run("show", full, name("a").key.hex()[:8])
    assert result.exit_code == 0, result.output
    (make,) = json.loads(result.output)
    assert make["files"][name("a").path(0, 2)] == {"model": "tiny", "method": "sculpt"}
    assert make["files"][name("a").path(1, 2)]["unusable"] == "cut_off"


def test_verify_finds_the_file_that_was_altered_and_changes_nothing(full):
    assert run("verify", full).exit_code == 0
    path = full / name("a").path(1, 2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = path.stat().st_mtime_ns
    result = run("verify", full)
    assert result.exit_code == 1
    assert f"altered: {name('a').path(1, 2)} was altered" in result.output
    assert "2 files are whole, 1 unusable" in result.output
    assert path.stat().st_mtime_ns == before


def test_rm_asks_before_it_removes_a_segment(full):
    key = name("a").key.hex()[:8]
    assert run("rm", full, key, input="n\n").exit_code == 1
    assert keys(full) == {name("a").key, name("b").key}
    result = run("rm", full, key, input="y\n")
    assert result.exit_code == 0
    assert "Remove 1 segments" in result.output
    assert keys(full) == {name("b").key}


def test_rm_by_age_and_all_of_them(full):
    assert run("rm", full, "--older-than", 11, "--yes").exit_code == 0
    assert len(keys(full)) == 2
    assert run("rm", full, "--older-than", 9, "--yes").exit_code == 0
    assert keys(full) == {name("a").key}
    assert run("rm", full, "--all", "--yes").exit_code == 0
    assert list(full.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rm"], "name either segments"),
        (["rm", "--all", "--older-than", "3"], "name either segments"),
        (["rm", "abc", "--all"], "name either segments"),
        (["rm", "--older-than", "-1"], "--older-than"),
        (["rm", "--yes", "xyz"], "'xyz' is no key"),
        (["rm", "--yes", "../../etc"], "is no key"),
        (["show", "ffff"], "no key begins with 'ffff'"),
        (["show"], "Missing argument"),
    ],
)
def test_bad_usage_is_told_and_removes_nothing(full, arguments, says):
    result = run(arguments[0], full, *arguments[1:], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert says in result.output
    assert len(keys(full)) == 2


def test_a_beginning_that_two_keys_have_is_refused(tmp_path):
    store, first = Store(str(tmp_path), None, True), name("a").key
    for key in (first, first[:-1] + bytes([first[-1] ^ 1])):
        store.write(segment(key=key))
    result = run("show", tmp_path, first.hex()[:10])
    assert result.exit_code == 2
    assert "2 keys begin" in result.output


@pytest.mark.parametrize("command", [["ls"], ["show", "ab"], ["verify"], ["rm", "--all", "--yes"]])
def test_a_store_that_is_not_there_is_told_and_not_made(tmp_path, command):
    result = run(command[0], tmp_path / "none", *command[1:])
    assert result.exit_code == 1
    assert "is not there" in result.output
    assert not (tmp_path / "none").exists()
    assert run("ls", "nosuch://x").exit_code == 2
