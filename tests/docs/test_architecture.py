"""The map of the code names the files that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"[\w/]+\.py\b")


def test_every_file_that_a_document_names_is_there():
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    missing = [
        f"{document.name}: {name}"
        for document in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
        for name in NAMED.findall(document.read_text(encoding="utf-8"))
        if not any(f"/{file}".endswith(f"/{name}") for file in files)
    ]
    assert not missing


def test_every_file_of_the_engine_the_algorithm_and_the_store_is_on_the_map():
    architecture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = architecture.partition("\n## Layout\n")[2].partition("\n## ")[0]
    on_map = set(NAMED.findall(tree))
    package = ROOT / "kvsculpt_vllm"
    rooms = [package / room for room in ("sculpt", "store", "engine")]
    files = [*package.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))]
    assert {path.name for path in files} - {"__init__.py"} <= on_map
