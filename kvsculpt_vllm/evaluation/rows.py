"""The rows of a result file, for whoever shows them: without torch, without the harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file that `kvsculpt eval --json` wrote.

    Raises:
        ValueError: it is no such file.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if all({"method", "budget", "keep_ratio", "settings"} <= row.keys() for row in rows):
            return rows
    except (ValueError, AttributeError, TypeError):
        pass
    raise ValueError(f"{path} is there and is not a result file of `kvsculpt eval`: give another name or remove it")
