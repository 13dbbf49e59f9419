"""`kvsculpt precompute`: what files ask for, and what is in the store after it."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kvsculpt_vllm.cli import app
from kvsculpt_vllm.demo import document
from kvsculpt_vllm.models import fast_dtype
from kvsculpt_vllm.precompute import Wanted, WrongInput, read_wanted

TOOLS = [{"type": "function", "function": {"name": "f"}}]
MESSAGES = [{"role": "system", "content": "You read."}, {"role": "user", "content": "Ünï\u2028code"}]


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_a_text_is_one_prefix_and_each_line_of_messages_is_one(tmp_path):
    text = write(tmp_path / "a.txt", "first line", "", "third line")
    lines = write(
        tmp_path / "b.jsonl", MESSAGES, "", {"messages": MESSAGES, "tools": TOOLS}, {"messages": MESSAGES, "name": "me"}
    )
    assert read_wanted([text, lines]) == [
        Wanted("a.txt", text="first line\n\nthird line"),
        Wanted("b.jsonl:1", messages=MESSAGES),
        Wanted("b.jsonl:3", messages=MESSAGES, tools=TOOLS),
        Wanted("me", messages=MESSAGES),
    ]


def test_characters_that_json_leaves_as_they_are_do_not_end_a_line(tmp_path):
    """U+2028 and its like end a line for `str.splitlines`, and not for JSON."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(MESSAGES, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_wanted([file]) == [Wanted("a.jsonl:1", messages=MESSAGES)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ('"text"', "str; allowed: a list of messages"),
        ("17", "int; allowed"),
        ({"messages": MESSAGES, "prompt": "x", "model": "y"}, "unknown keys model, prompt; allowed"),
        ({"name": "no messages"}, "messages must be"),
        ({"messages": "text"}, "messages must be"),
        ([], "messages must be"),
        (["text"], "messages must be"),
        ([{"content": "nobody says it"}], "messages must be"),
        ([*MESSAGES, {"role": 3}], "messages must be"),
        ({"messages": MESSAGES, "tools": "f"}, "tools must be"),
        ({"messages": MESSAGES, "name": 5}, "name must be"),
    ],
)
def test_a_wrong_line_is_told_with_file_and_number(tmp_path, line, told):
    file = write(tmp_path / "a.jsonl", MESSAGES, "", line)
    with pytest.raises(WrongInput, match=r"a\.jsonl:3: ") as caught:
        read_wanted([file])
    assert told in str(caught.value)


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, told in (("none.txt", "No such file"), ("binary.txt", "utf-8"), (".", "directory")):
        with pytest.raises(WrongInput, match=told) as caught:
            read_wanted([tmp_path / name])
        assert str(tmp_path / name) in str(caught.value)
    for name in ("empty.txt", "empty.jsonl"):
        with pytest.raises(WrongInput, match=f"{name}: it is empty"):
            read_wanted([write(tmp_path / name, "", "  ")])


def test_wrong_input_ends_the_command_before_an_engine_starts(tmp_path):
    file = write(tmp_path / "a.jsonl", "{")
    arguments = ["precompute", str(file), "--store", str(tmp_path / "store"), "--model", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "a.jsonl:1: not JSON" in result.output
    result = CliRunner().invoke(app, [*arguments, "--effort", "heroic"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "'heroic' is none of: fast, balanced, thorough" in result.output


def test_a_model_that_cannot_be_prepared_is_told_without_a_traceback(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no directory can be made in here")
    text = write(tmp_path / "a.txt", "Some text.")
    arguments = ["precompute", str(text), "--store", str(tmp_path / "store"), "--model", "smollm2-135m"]
    result = CliRunner().invoke(app, arguments, env={"KVSCULPT_CACHE": str(blocked)})
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "kvsculpt precompute: " in result.output and str(blocked) in result.output


@pytest.mark.engine
def test_what_was_precomputed_is_found_in_the_store_by_the_next_engine(first_layers_path, tmp_path):
    """The flags are those of a server that only reads its store: what is made is written all the same."""
    files = [
        write(tmp_path / "a.txt", document()),
        write(tmp_path / "b.jsonl", [{"role": "user", "content": document()}]),
    ]
    short = write(tmp_path / "short.txt", "Too short to be sculpted.")
    flags = ["--enforce-eager", "--max-model-len", "4096", "--kv-cache-memory-bytes", str(1 << 28)]
    flags += ["--dtype", fast_dtype(), "--kv-compression-store-mode", "read", "--kv-compression-keep-ratio", "0.5"]

    def precompute(*files):
        out = tmp_path / "out.json"
        command = "from kvsculpt_vllm.cli import main; main()"
        arguments = ["precompute", *map(str, files), "--store", str(tmp_path / "store")]
        arguments += ["--model", str(first_layers_path)]
        arguments += ["--effort", "fast", "--json", str(out), "--", *flags]
        done = subprocess.run(
            [sys.executable, "-c", command, *arguments],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},  # a second process would import vLLM again
        )
        assert done.returncode in (0, 1), done.stderr[-4000:]
        return done.returncode, json.loads(out.read_text())

    code, made = precompute(*files)
    assert code == 0
    assert [row["name"] for row in made] == ["a.txt", "b.jsonl:1"]
    for row in made:
        assert row["sculpted"] > 1000 and row["found"] == 0 and not row["reason"]
        assert row["tokens"] - row["sculpted"] < 64 + 32  # all but the window, in whole blocks
        assert 0.3 < row["entries"] / row["sculpted"] < 0.6
    stored = list((tmp_path / "store").rglob("*.safetensors"))
    sizes = sorted(file.stat().st_size for file in stored)
    assert sizes == pytest.approx(sorted(row["bytes"] for row in made), abs=4096)

    code, found = precompute(*files, short)
    assert code == 1  # one is too short
    assert [(row["sculpted"], row["found"]) for row in found] == [*((0, row["sculpted"]) for row in made), (0, 0)]
    assert [row["reason"] for row in found] == ["", "", "short"]
    assert sorted((tmp_path / "store").rglob("*.safetensors")) == sorted(stored)
