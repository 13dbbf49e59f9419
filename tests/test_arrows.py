"""Arrows between the package's rooms point one way: serving → engine → sculpt → kernels, engine → store."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvsculpt_vllm

PACKAGE = Path(kvsculpt_vllm.__file__).parent
KERNELS = PACKAGE.parent / "kernels"

BEHIND = ("kvsculpt_vllm.engine", "kvsculpt_vllm.serving", "kvsculpt_vllm.evaluation", "vllm", "transformers")
FORBIDDEN = {
    "kernels": (*BEHIND, "kvsculpt_vllm.sculpt", "kvsculpt_vllm.store"),
    "sculpt": (*BEHIND, "kvsculpt_vllm.store"),
    "store": BEHIND,
    "evaluation": ("vllm", "kvsculpt_vllm.engine", "kvsculpt_vllm.serving", "kvsculpt_vllm.store"),
    "engine": ("kvsculpt_vllm.serving", "kvsculpt_vllm.evaluation"),
    "engine/shared": ("kvsculpt_vllm.engine.startup", "kvsculpt_vllm.engine.scheduler", "kvsculpt_vllm.engine.worker"),
    "engine/compat": ("kvsculpt_vllm.engine.startup", "kvsculpt_vllm.engine.scheduler", "kvsculpt_vllm.engine.worker"),
    "engine/scheduler": ("kvsculpt_vllm.engine.worker",),
    "engine/worker": ("kvsculpt_vllm.engine.scheduler",),
    "serving": ("kvsculpt_vllm.engine.scheduler", "kvsculpt_vllm.engine.worker"),
}


def imports(file: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, names of `from` imports included, as they may be modules."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_file_imports_against_the_arrows(room):
    files = sorted((KERNELS if room == "kernels" else PACKAGE / room).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(PACKAGE.parent)} imports {module}"
        for file in files
        for module in imports(file)
        if any(module == barred or module.startswith(f"{barred}.") for barred in FORBIDDEN[room])
    ]
    assert not wrong
