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
    """Run all slices in a row."""
    while True:
        try:
            next(slices)
        except StopIteration as stop:
            return stop.value


def at_once(in_slices: Callable[Given, Slices[Result]]) -> Callable[Given, Result]:
    """The same function, but with all its slices run in a row."""

    @wraps(in_slices)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        return finish(in_slices(*args, **kwargs))

    return run


def within(context: Callable[[], AbstractContextManager[Any]], slices: Slices[Result]) -> Slices[Result]:
    """The same slices, each inside a context of its own, which is left wherever the work pauses."""
    while True:
        with context():
            try:
                next(slices)
            except StopIteration as stop:
                return stop.value
        yield


class Stopwatch:
    """Seconds spent inside it, in as many turns as it takes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> Stopwatch:
        """Itself, as a context for `within`."""
        return self

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._begin
