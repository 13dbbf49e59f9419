"""What the documents and the code cite is in this repository."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/LOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
DEFINITION = re.compile(r"^\[([\w-]+)\]: (\S+)$", re.MULTILINE)
REFERENCE = re.compile(r"\[[^\]]*\]\[([\w-]+)\]")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
CITED = re.compile(r"\bdocs/\w+\.md(?:#[\w-]+)?")
ELSEWHERE = re.compile(
    # Notes and data that lay beside the repository while it was written: a clone does not have them.
    r"\.\./shared|(?<![\w/])shared/\w|\b(?:design|segments|style)\.md|\bvllm-0\.\d+\.md|/work/"
)


@cache
def anchors(path):
    """The anchors that GitHub gives a document's headings."""
    found = []
    for heading in HEADING.findall(FENCED.sub("", path.read_text(encoding="utf-8"))):
        plain = LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{repeated}" if repeated else slug)
    return set(found)


def dead(base, target):
    """Whether `target`, as a document in the folder `base` writes it, leads nowhere."""
    name, _, anchor = target.partition("#")
    path = (base / name).resolve()
    if not (path.exists() and path.is_relative_to(ROOT)):
        return True
    return bool(anchor) and anchor not in anchors(path)


def links(path):
    text = CODE_SPAN.sub("", FENCED.sub("", path.read_text(encoding="utf-8")))
    defined = dict(DEFINITION.findall(text))
    undefined = [f"[{name}]" for name in REFERENCE.findall(text) if name not in defined]
    found = [*LINK.findall(text), *defined.values(), *undefined]
    return [link for link in found if not re.match(r"https?:|mailto:", link)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(path):
    broken = []
    for link in links(path):
        here = f"{path.name}{link}" if link.startswith("#") else link
        if dead(path.parent, here):
            broken.append(link)
    assert not broken


def files():
    """Every text file that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    suffixes = {".py", ".md", ".toml", ".html", ".service", ""}
    names = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in names if path.suffix in suffixes and path.is_file() and path != Path(__file__)]


def test_sections_that_code_cites_are_there():
    broken = [
        f"{path.relative_to(ROOT)}: {cited}"
        for path in files()
        for cited in CITED.findall(path.read_text(encoding="utf-8"))
        if dead(ROOT, cited)
    ]
    assert not broken


def test_nothing_outside_of_the_repository_is_cited():
    found = [
        f"{path.relative_to(ROOT)}: {cited[0]}"
        for path in files()
        for cited in ELSEWHERE.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_anchors_are_those_of_github(tmp_path):
    document = tmp_path / "document.md"
    document.write_text("# A `b`, c\n## 2026-11-25, later · budgets\n## Same\n```\n# code\n```\n## Same\n")
    assert anchors(document) == {"a-b-c", "2026-11-25-later--budgets", "same", "same-1"}
    assert dead(tmp_path, "document.md#same")  # it is no part of the repository
