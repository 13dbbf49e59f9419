"""The result file: one row per (method, budget, keep ratio), and what an interrupted run had measured."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import kvsculpt_vllm
from kvsculpt_vllm.calibration_file import NONE
from kvsculpt_vllm.evaluation.harness import ONE_SPAN
from kvsculpt_vllm.evaluation.rows import Row, read_rows
from kvsculpt_vllm.sculpt.options import METHODS as OURS

HARNESS = (
    "attention",
    "chain",
    "continuation",
    "harness",
    "metrics",
    "model",
    "retrieval",
    "softmax",
    "texts",
    "windows",
)
"""The modules of this package that decide numbers, besides its methods and tasks; the others show them."""

CALIBRATED = {"sculpt", "sculpt_rounded_fp8", "sculpt_fp8", "sculpt_hadamard_fp8"}
"""The methods that follow a calibration: in adaptive budgets, and in the order of entries with any budgets. What rows
of others hold is the same with any calibration."""

Key = tuple[str, str, float]  # method, budget, keep ratio


class Measured(Protocol):
    """What is measured of one context, or of one sample of a task."""

    def to_json(self) -> dict[str, Any]:
        """Make plain JSON values, as the file of single measurements holds them."""
        ...

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Self:
        """Make a measurement of what `to_json` gave."""
        ...

    @staticmethod
    def summary(measurements: Sequence[Any]) -> Row:
        """Compute the numbers of a row."""
        ...


class Results:
    """Rows in a JSON file (a list, one row a line), written again after every row that is complete.

    Single measurements wait in `<file>.parts` until a row has all its contexts, so that a killed run goes on where
    it stopped. A row counts as done only if its `settings` are the ones asked for; they name the code that measured
    it (`code_version`), so that a changed method is measured anew. Rows of other settings stay in the file; rows of
    the same settings but other code are replaced. Only rows of `CALIBRATED` methods name a calibration, and only those
    of our own methods the length of a segment: the peers compress a context at once.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], num_contexts: int, kind: type[Measured]) -> None:
        """With `path` None nothing is read or written.

        Raises:
            ValueError: the file is there and is not a result file.
        """
        self._path, self._settings, self._num_contexts, self._kind = path, settings, num_contexts, kind
        self._rows: list[Row] = []
        self._measured: dict[Key, dict[int, Measured]] = {}
        if path is None:
            return
        if path.exists():
            self._rows = read_rows(path)
        if (parts := _parts(path)).exists():
            self._read_parts(parts)

    def row(self, key: Key) -> Row | None:
        """The finished row of these settings, if there is one."""
        settings = self._settings_of(key)
        return next((row for row in self._rows if row["settings"] == settings and _key(row) == key), None)

    def missing(self, key: Key) -> list[int]:
        """Contexts that are still to be measured for a row."""
        if self.row(key) is not None:
            return []
        return [i for i in range(self._num_contexts) if i not in self._measured.get(key, {})]

    def add(self, key: Key, context: int, measurement: Measured) -> None:
        """Keep one measurement; once there are all of a row, they become its numbers."""
        measured = self._measured.setdefault(key, {})
        measured[context] = measurement
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            plain = measurement.to_json()
            part = {"settings": self._settings_of(key), "key": key, "context": context, "measurement": plain}
            with _parts(self._path).open("a") as file:
                file.write(json.dumps(part) + "\n")
        if len(measured) == self._num_contexts:
            self._finish(key, self._kind.summary([measured[i] for i in range(self._num_contexts)]))

    def close(self, keys: list[Key]) -> None:
        """Drop the single measurements if every row that was asked for is complete."""
        if self._path is not None and not any(self.missing(key) for key in keys):
            _parts(self._path).unlink(missing_ok=True)

    def _settings_of(self, key: Key) -> dict[str, Any]:
        calibration = {} if key[0] in CALIBRATED else {"calibration": NONE}
        return self._settings | calibration | {"segment": segment_of(key[0], self._settings.get("segment", ONE_SPAN))}

    def _finish(self, key: Key, numbers: Row) -> None:
        settings = self._settings_of(key)
        row = dict(zip(("method", "budget", "keep_ratio"), key, strict=True)) | numbers | {"settings": settings}
        same = [_but_code(settings), key]
        self._rows = [old for old in self._rows if [_but_code(old["settings"]), _key(old)] != same] + [row]
        if self._path is None:
            return
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text("[\n" + ",\n".join(json.dumps(row) for row in self._rows) + "\n]\n")
        os.replace(partial, self._path)

    def _read_parts(self, parts: Path) -> None:
        for line in parts.read_text().splitlines():
            try:
                part = json.loads(line)
            except json.JSONDecodeError:  # a killed process left half a line
                continue
            key = tuple(part["key"])
            if part["settings"] == self._settings_of(key):
                measured = self._measured.setdefault(key, {})
                measured[part["context"]] = self._kind.from_json(part["measurement"])


def segment_of(method: str, asked: int) -> int:
    """Say in segments of how many tokens a method compresses a context: those `asked` for if it is one of ours. Peers
    take a context at once, as published.
    """
    return asked if method in OURS else ONE_SPAN


def code_version() -> str:
    """A hash of what decides the numbers: the algorithm, the methods and the harness, not what shows them."""
    root = Path(kvsculpt_vllm.__file__).parent
    digest = hashlib.sha256()
    harness = [root / "evaluation" / f"{name}.py" for name in HARNESS]
    rooms = ("sculpt/**", "evaluation/methods", "evaluation/tasks")
    for path in sorted([*(path for room in rooms for path in root.glob(f"{room}/*.py")), *harness]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _parts(path: Path) -> Path:
    """Where the single measurements of a result file wait."""
    return path.with_name(path.name + ".parts")


def _key(row: Row) -> Key:
    return row["method"], row["budget"], row["keep_ratio"]


def _but_code(settings: dict[str, Any]) -> dict[str, Any]:
    # Rows of before there were calibrations or segments do not name theirs.
    return {"calibration": NONE, "segment": ONE_SPAN} | {
        name: value for name, value in settings.items() if name != "code"
    }
