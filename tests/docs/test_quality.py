"""Tables of tasks: their intervals are Wilson's, wins are counted by sample, and too few samples are not shown."""

import importlib.util
import json
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from typer.testing import CliRunner

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quality.py"
SPEC = importlib.util.spec_from_file_location("benchmarks_quality", SCRIPT)
quality = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(quality)

APP = typer.Typer()
APP.command()(quality.main)


def row(task, method, scores, full=(1.0,) * 8, measure="score", keep_ratio=0.3, calibration="none", **changed):
    settings = {"model": "tiny-Instruct", "text": "pydoc", "context": 2048, "seed": 0, "effort": "balanced"}
    settings |= {"segment": 0, "calibration": calibration, "num_contexts": len(scores), "task": task} | changed
    numbers = {f"{measure}_per_sample": list(scores), f"{measure}_full_per_sample": list(full)}
    numbers |= {"score_per_question": [0.5, 1, 1, 1], "score_full_per_question": [1, 1, 1, 1]}
    if measure != "score":
        numbers |= {"score_per_sample": list(scores), "score_full_per_sample": list(full)}
    key = {"method": method, "budget": "adaptive", "keep_ratio": keep_ratio}
    return key | numbers | {"settings": settings}


HALF = (1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
ROWS = [
    row("niah", "sculpt", (1.0,) * 8, calibration="abc"),
    row("niah", "select", HALF),
    row("niah", "snapkv", (1.0,) * 4),
    row("qa", "sculpt", HALF, calibration="abc"),
    row("qa", "select", HALF[::-1]),
    row("instructions", "sculpt", HALF, full=(0.0,) * 8, measure="leakage", calibration="abc"),
    row("conversation", "sculpt", HALF, calibration="abc"),
]


@given(st.integers(1, 60).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_intervals_are_wilson_s(counts):
    good, count = counts
    expected = binomtest(good, count).proportion_ci(0.95, method="wilson")
    interval = quality.wilson([1.0] * good + [0.0] * (count - good))
    assert interval == pytest.approx((good / count, expected.low, expected.high), abs=1e-6)


def test_a_score_in_parts_has_the_interval_of_as_many_whole_ones():
    assert quality.wilson([0.5] * 8) == pytest.approx(quality.wilson(HALF))


def test_each_task_is_a_line_with_the_full_cache_and_every_way():
    heading, body = quality.scores(quality.Measured(ROWS))
    assert heading == ["score, keep 0.3", "task", "samples", "full cache", "sculpt, calibrated", "select, adaptive"]
    assert [line[1] for line in body] == ["niah", "qa", "instructions", "conversation"]
    assert body[0] == ["tiny, 2,048 tokens", "niah", "8", "1.00 [0.68, 1.00]", "1.00 [0.68, 1.00]", "0.50 [0.22, 0.78]"]
    assert body[2][-1] == "–"


def test_rows_with_too_few_samples_are_left_out():
    assert "snapkv, adaptive" in quality.scores(quality.Measured(ROWS, 4))[0]
    assert quality.Measured(ROWS, 9).rows == []


def test_rows_of_other_samples_are_not_compared():
    rows = [row("niah", "sculpt", (1.0,) * 16, full=(1.0,) * 16), row("niah", "select", HALF)]
    assert quality.scores(quality.Measured(rows))[1][0][-2:] == ["1.00 [0.81, 1.00]", "–"]
    assert [line[1] for line in quality.wins(quality.Measured(rows))[1]] == ["sculpt, by a pilot / full cache"]


def test_wins_and_losses_are_counted_sample_by_sample():
    _, body = quality.wins(quality.Measured(ROWS))
    lines = {line[1]: line[2:] for line in body}
    assert lines["sculpt, calibrated / select, adaptive"] == ["8 / 4 / 4", *["–"] * 4, "8 / 4 / 4", "0.67 [0.39, 0.86]"]
    assert lines["sculpt, calibrated / full cache"][0] == "0 / 12 / 4"


def test_leakage_is_a_table_of_its_own():
    (line,) = quality.leakage(quality.Measured(ROWS))[1]
    assert line[1:5] == ["instructions", "8", "0.00 [0.00, 0.32]", "0.50 [0.22, 0.78]"]


def test_conversations_are_told_by_turn():
    heading, body = quality.turns(quality.Measured(ROWS))
    assert heading[2:] == ["6 turns ago", "5 turns ago", "3 turns ago", "1 turn ago"]
    assert [line[1:3] for line in body] == [["full cache", "1.00"], ["sculpt, calibrated", "0.50"]]


def test_every_task_belongs_to_one_family():
    assert sorted(task for tasks in quality.FAMILIES.values() for task in tasks) == sorted(quality.TASKS)


def test_the_script_prints_the_tables_and_draws(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(ROWS))
    found = CliRunner().invoke(APP, [str(tmp_path)])
    assert found.exit_code == 0, found.output
    told = json.loads(found.output.splitlines()[-1])
    assert set(quality.TABLES) <= set(told) and Path(told["png"]).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("[1, 2]", [], "is not a result file"),
        ("{", [], "is not a result file"),
        (json.dumps([{"score": 1, "settings": {"task": "niah"}}]), [], "measure it anew"),
        (json.dumps(ROWS), ["--min-samples", "99"], "holds no row of a task with 99 samples"),
        (json.dumps(ROWS), ["--keep-ratio", "0.7"], "got 0.7, measured: 0.3"),
    ],
)
def test_what_cannot_be_shown_is_told(tmp_path, content, arguments, message):
    (tmp_path / "tiny.json").write_text(content)
    found = CliRunner().invoke(APP, [str(tmp_path), *arguments])
    assert found.exit_code == 2
    assert message in " ".join(found.output.replace("│", " ").split())


def test_a_folder_that_is_not_there_has_no_rows(tmp_path):
    assert quality.read(tmp_path / "none") == []
