"""Where tables come from: result files, and modules that are no part of a package."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@cache
def result(file: str) -> Any:
    """What a result file in benchmarks/results holds."""
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


def module(path: Path) -> Any:
    """A file that is no part of a package, as a module."""
    spec = spec_from_file_location(f"tables_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    found = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
