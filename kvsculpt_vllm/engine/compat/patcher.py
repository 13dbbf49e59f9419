"""How a function of vLLM is replaced: `patches` declares it, and `apply` here, nothing else, does it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from kvsculpt_vllm.plugin import installed_vllm

_MARK = "kvsculpt_patch"


@dataclass(frozen=True)
class Patch:
    """A function that we wrap, or a private method that a class of ours overrides.

    A test compares `parameters` with vLLM's own: a vLLM that has changed the function fails there by name, and not
    somewhere in the middle of a request.
    """

    target: str
    """Where it is, as `module:function` or `module:Class.method`."""
    parameters: tuple[str, ...]
    """The names of its parameters, in order."""
    can_go_when: str
    versions: str = ""
    """Of those that are supported, the versions of vLLM that have it so; all of them, if it is empty."""

    def is_for(self, version: str) -> bool:
        """Whether that vLLM has the function so."""
        return has(self.versions, version)

    def find(self) -> tuple[Any, str]:
        """The module or class that has the function, and the function's name in it.

        Raises:
            ImportError, AttributeError: this vLLM does not have it.
        """
        module, _, path = self.target.partition(":")
        owner: Any = import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        getattr(owner, name)
        return owner, name


def has(versions: str, version: str) -> bool:
    """Whether a version is among some; a release candidate is taken for its release."""
    return not versions or Version(version).base_version in SpecifierSet(versions)


def apply(patch: Patch, make: Callable[[Callable[..., Any]], Callable[..., Any]], instance: Any = None) -> None:
    """Put `make(stock)` in the place of the stock function, once; calling it again changes nothing.

    With an `instance` only that object's method is replaced, else everybody's. A patch of other versions of vLLM than
    the one that is installed is passed over.
    """
    if patch.versions and not patch.is_for(installed_vllm() or ""):
        return
    owner, name = patch.find()
    holder = owner if instance is None else instance
    stock = getattr(holder, name)
    if hasattr(stock, _MARK):
        return
    hook = wraps(stock)(make(stock))
    setattr(hook, _MARK, patch)
    is_static = instance is None and isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(holder, name, staticmethod(hook) if is_static else hook)


def is_applied(patch: Patch) -> bool:
    """Whether the function has been replaced for everybody."""
    owner, name = patch.find()
    return hasattr(getattr(owner, name), _MARK)
