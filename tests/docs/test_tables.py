"""The generated tables of README.md and docs/*.md are those that `make docs` writes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables" / "__init__.py")
tables = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = tables  # where its modules look for one another
SPEC.loader.exec_module(tables)


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: path.name)
def test_tables_are_as_generated(path):
    text = path.read_text(encoding="utf-8")
    assert text == tables.renewed(text), "a table is stale: run `make docs`"


def test_every_table_is_shown():
    shown = {name for path in tables.documents() for name in tables.MARKER.findall(path.read_text(encoding="utf-8"))}
    assert shown == tables.TABLES.keys()


def test_tables_of_result_files_are_made_without_torch():
    source = """
import sys, tables
for kind in (tables.quality, tables.benchmarks, tables.chains, tables.paper, tables.serving, tables.reuse, tables.gpu):
    for make in kind.TABLES.values():
        make()
print(*{"torch", "transformers", "vllm"} & sys.modules.keys())
"""
    ran = subprocess.run([sys.executable, "-c", source], cwd=DOCS, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "\n"), ran.stderr


def test_a_stale_table_is_rewritten_and_the_rest_stays():
    text = "before\n<!-- generated: cost-small -->\nold\n<!-- end: cost-small -->\nafter\n"
    made = tables.TABLES["cost-small"]()
    assert tables.renewed(text) == f"before\n<!-- generated: cost-small -->\n{made}\n<!-- end: cost-small -->\nafter\n"


@pytest.mark.parametrize(
    "text",
    [
        "<!-- generated: cost -->\nno end\n",
        "no beginning\n<!-- end: cost -->\n",
        "<!-- generated: cost -->\n<!-- end: flags -->\n",
        "<!-- generated: unheard-of -->\n\n<!-- end: unheard-of -->\n",
    ],
)
def test_markers_that_cannot_be_filled_are_an_error(text):
    with pytest.raises(ValueError, match=r"marker|unknown"):
        tables.renewed(text)


def test_mean_over_both_texts_and_the_larger_percentile(monkeypatch):
    def row(text, kl_mean, kl_p99, num_contexts=4):
        settings = {"text": text, "effort": "balanced", "num_contexts": num_contexts}
        numbers = {"kl_mean": kl_mean, "kl_p99": kl_p99}
        return {"method": "select", "budget": "uniform", "keep_ratio": 0.3, "settings": settings} | numbers

    measured = tables.measured
    moby, pydoc = measured.TEXTS
    rows = [row(moby, 0.2, 3.0), row(moby, 9.0, 9.0, num_contexts=1), row(pydoc, 0.4, 2.0)]
    monkeypatch.setattr(measured, "rows_of", lambda file: rows)
    assert measured.kl("", measured.SELECTION, 0.3) == pytest.approx((0.3, 3.0))
    rows.pop()  # of one text alone
    assert measured.kl("", measured.SELECTION, 0.3) is None
