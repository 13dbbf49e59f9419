"""Copies of a module with a fault: what checks find when the code that they check is broken."""

import importlib.util
import inspect
import itertools
import sys
from pathlib import Path
from types import ModuleType

_NUMBER = itertools.count()


def mutant(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """The module with some pieces of its source replaced, each of which must be there. Triton reads it from a file."""
    source = inspect.getsource(module)
    for old, new in changes:
        assert old in source, f"{module.__name__} has no {old!r} any more: give this fault anew"
        source = source.replace(old, new)
    name = f"mutant_{next(_NUMBER)}"
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    copy = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
