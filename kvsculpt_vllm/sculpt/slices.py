"""Work that can be put aside: generators that yield wherever they may pause, and return what they computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")
Slices = Generator[None, None, Result]
"""Between two slices anything may run: no setting of the process may be changed across a `yield` (see `within`)."""


def finish(slices: Slices[Result]) -> Result:
    """Run all slices in a row and return their result."""
    while True:
        try:
            next(slices)
        except StopIteration as stop:
            return stop.value


def at_once(in_slices: Callable[Given, Slices[Result]]) -> Callable[Given, Result]:
    """Make, of a function that works in slices, one that runs all of them in a row and returns their result."""

    @wraps(in_slices)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        return finish(in_slices(*args, **kwargs))

    return run


def within(context: Callable[[], AbstractContextManager[Any]], slices: Slices[Result]) -> Slices[Result]:
    """Run each slice inside a context of its own, made by `context`, and leave the context wherever the work pauses."""
    while True:
        with context():
            try:
                next(slices)
            except StopIteration as stop:
                return stop.value
        yield


class Stopwatch:
    """A context that adds up the `seconds` spent inside it, however often it is entered."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> Stopwatch:
        """Return itself: `within` asks for a function that makes the context."""
        return self

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._begin
