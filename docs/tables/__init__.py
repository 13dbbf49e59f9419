"""Rewrite the generated tables of README.md and docs/*.md: `make docs`.

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``. It comes from the result files in
benchmarks/results or from the code, so that no number and no flag is written down twice. `tests/docs/test_tables.py`
fails while a table is not what this would write.

Each kind of table has a file here, whose `TABLES` names what it makes. Nothing is imported that a table does not need:
those of result files come without torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from . import benchmarks, chains, declared, gpu, memory, paper, quality, reuse, serving
from .sources import ROOT

PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(\n<!-- end: \2 -->)", re.DOTALL)
MARKER = re.compile(r"^<!-- (?:generated|end): ([\w-]+) -->$", re.MULTILINE)

TABLES: dict[str, Callable[[], str]] = {
    **quality.TABLES,
    **benchmarks.TABLES,
    **chains.TABLES,
    **paper.TABLES,
    **serving.TABLES,
    **reuse.TABLES,
    **declared.TABLES,
    **memory.TABLES,
    **gpu.TABLES,
}
"""What can stand between markers."""


def documents() -> list[Path]:
    """The files that may hold generated tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def renewed(text: str) -> str:
    """`text` with each of its generated tables as it is now.

    Raises:
        ValueError: a marker without its other half, or a table that nobody generates.
    """
    found = [name for _, name, _ in PART.findall(text)]
    if sorted(MARKER.findall(text)) != sorted(2 * found):
        raise ValueError(f"markers without their other half, other than those of {', '.join(found) or 'no table'}")
    if unknown := set(found) - TABLES.keys():
        raise ValueError(f"unknown tables {', '.join(sorted(unknown))}, known are {', '.join(TABLES)}")
    return PART.sub(lambda part: part[1] + TABLES[part[2]]() + part[3], text)


def main() -> None:
    """Write every document that has changed."""
    for path in documents():
        before = path.read_text(encoding="utf-8")
        after = renewed(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: tables rewritten")
