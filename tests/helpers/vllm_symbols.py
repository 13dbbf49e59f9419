"""What is in vLLM's sources, without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path


class Sources:
    """The tree of one vLLM, as the folder that its package lies in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._module = cache(self._parse)

    def has(self, target: str) -> bool:
        """Whether there is `module`, `module:name` or `module:Class.name`, the last one as an attribute of objects."""
        return self.find(target) is not None

    def parameters(self, target: str) -> tuple[str, ...]:
        """The names of a function's parameters, in order, as `inspect.signature` has them."""
        found = self.find(target)
        assert isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef), f"{target} is no function"
        given = found.args
        names = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
        return tuple(name.arg for name in names if name is not None)

    def find(self, target: str) -> ast.AST | None:
        """The node that defines it, None if there is none."""
        module, _, path = target.partition(":")
        tree = self._module(module)
        if tree is None or not path:
            return tree
        name, *rest = path.split(".")
        found = self._in_module(module, name)
        for part in rest:
            if not isinstance(found, tuple) or not isinstance(found[1], ast.ClassDef):
                return None
            found = self._in_class(*found, part)
        return found[1] if found is not None else None

    def _parse(self, module: str) -> ast.Module | None:
        path = self._folder / Path(*module.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text())
        return None

    def _in_module(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The module that defines a name of this one, and its node there."""
        tree = self._module(module)
        if tree is None:
            return None
        for node in _at_top(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*" and (found := self._in_module(self._origin(module, node), name)):
                        return found
                    if (alias.asname or alias.name) == name:
                        origin = self._origin(module, node)
                        if not origin.startswith("vllm"):
                            return module, node
                        return self._in_module(origin, alias.name) or self._submodule(f"{origin}.{alias.name}")
            elif name in _named(node):
                # What is imported when it is asked for: {"LLM": ".entrypoints.llm:LLM"}.
                if isinstance(node, ast.Dict) and isinstance(text := _values(node)[name], str) and ":" in text:
                    origin, _, path = text.partition(":")
                    return self._in_module(f"{module}{origin}", path)
                return module, node
        return self._submodule(f"{module}.{name}")

    def _submodule(self, module: str) -> tuple[str, ast.AST] | None:
        tree = self._module(module)
        return None if tree is None else (module, tree)

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = (self._folder / Path(*module.split(".")) / "__init__.py").is_file()
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _in_class(self, module: str, kind: ast.ClassDef, name: str) -> tuple[str, ast.AST] | None:
        """An attribute of a class, of its objects, or of a class that it is derived from."""
        for node in kind.body:
            if name in _named(node):
                return module, node
        for node in ast.walk(kind):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute) and target.attr == name and ast.unparse(target.value) == "self":
                    return module, node
        for base in kind.bases:
            if isinstance(base, ast.Subscript):
                base = base.value
            found = self._in_module(module, base.id) if isinstance(base, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef) and (there := self._in_class(*found, name)):
                return there
        return None


def _at_top(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements of a module, those under an `if` or `try` included, and the dictionaries that it assigns."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _at_top(node)
            continue
        yield node
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            yield node.value


def _named(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign):
        return {node.target.id} if isinstance(node.target, ast.Name) else set()
    if isinstance(node, ast.Dict):
        return set(_values(node))
    return set()


def _values(node: ast.Dict) -> dict[str, object]:
    return {
        key.value: value.value if isinstance(value, ast.Constant) else value
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


def imported(package: Path, vllm: Sources) -> dict[str, set[str]]:
    """What a package takes from a vLLM, as targets, and the files that do.

    Imports, wherever they stand, and the names of modules that are imported as a whole: `envs.VLLM_API_KEY`.
    """
    found: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        modules: dict[str, str] = {}
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and _is_vllm(node.module):
                for alias in node.names:
                    found.setdefault(f"{node.module}:{alias.name}", set()).add(file.name)
                    if vllm.has(module := f"{node.module}.{alias.name}"):
                        modules[alias.asname or alias.name] = module
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if _is_vllm(alias.name):
                        found.setdefault(alias.name, set()).add(file.name)
                        modules[alias.asname or alias.name] = alias.name
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                found.setdefault(f"{modules[node.value.id]}:{node.attr}", set()).add(file.name)
    return found


def _is_vllm(module: str | None) -> bool:
    return module is not None and (module == "vllm" or module.startswith("vllm."))
