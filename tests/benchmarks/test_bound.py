"""What a bound on the error comes to, read off measured rows; ranks are ranked by what has two contexts alike."""

import importlib.util
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bound.py"
SPEC = importlib.util.spec_from_file_location("benchmarks_bound", SCRIPT)
bound = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bound)

APP = typer.Typer()
APP.command()(bound.main)


def row(kept, errors, kls, method="sculpt", text="pydoc"):
    return {
        "method": method,
        "budget": "adaptive",
        "keep_ratio": kept,
        "kept_fraction": kept,
        "kl_mean": sum(kls) / len(kls),
        "kl_per_context": kls,
        "held_out_error_per_context": errors,
        "settings": {"model": "tiny-Instruct", "text": text, "effort": "fast"},
    }


ROWS = [
    row(0.2, [0.02, 0.004, 0.002], [0.3, 0.1, 0.2]),
    row(0.5, [0.005, 0.002, 0.0005], [0.03, 0.02, 0.01]),
    row(0.2, [9.0, 9.0, 9.0], [9.0, 9.0, 9.0], method="select"),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


def shown(folder):
    told = CliRunner().invoke(APP, [str(folder)])
    assert told.exit_code == 0, told.output
    return json.loads(told.output.splitlines()[-1])


def test_every_bound_keeps_the_least_that_meets_it_and_all_where_nothing_does(folder):
    found = [tuple(line.values())[2:] for line in shown(folder)["bounds"]]
    assert found == [
        ("0.03", "0.20, 0.20, 0.20", "0.20000, 0.30000"),
        ("0.01", "0.20, 0.30, 0.50", "0.11000, 0.20000"),
        ("0.003", "0.20, 0.57, 1.00", "0.07333, 0.20000"),
        ("0.001", "0.50, 0.83, 1.00", "0.00333, 0.01000"),
    ]


def test_ranks_agree_as_far_as_they_do(folder):
    found = {line["of"]: tuple(line.values())[1:] for line in shown(folder)["correlation"]}
    # By hand: 1 - 6 Σd² / (n (n² - 1)) without ties.
    assert found["tiny, 0.20 kept"] == ("3", f"{1 - 6 * (0 + 1 + 1) / 24:.2f}")
    assert found["tiny, 0.50 kept"] == ("3", "1.00")
    assert found["tiny, all"][0] == "6"
    assert (folder / "bound.png").stat().st_size > 1000


def test_what_is_no_result_file_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"kl_mean": 1, "method": "sculpt", "budget": "adaptive"}]))
    told = CliRunner().invoke(APP, [str(tmp_path)])
    assert told.exit_code == 2 and "errors by context" in words(told.output)
    empty = tmp_path / "none"
    empty.mkdir()
    assert "no row of sculpt" in words(CliRunner().invoke(APP, [str(empty)]).output)


def words(output):
    """What a box says, without its frame."""
    return " ".join(output.replace("│", " ").split())
