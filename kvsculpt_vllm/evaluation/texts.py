"""Texts to evaluate on, and the passages taken from them."""

from __future__ import annotations

import ast
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PYDOC, STDLIB, DOCSTRINGS = "pydoc", "stdlib", "docstrings"
MODULES = (
    *("argparse", "calendar", "configparser", "csv", "difflib", "email.message", "fractions", "heapq", "inspect"),
    *("ipaddress", "json.decoder", "logging", "mailbox", "optparse", "pickle", "random", "smtplib", "statistics"),
    *("tarfile", "textwrap", "typing", "unittest.mock", "urllib.parse", "zipfile"),
)
"""Those of Python's own whose source, comments and all, is the text ``stdlib``."""

PROSE = 300
"""A module's docstring with so many characters belongs to the text ``docstrings``."""


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens: what becomes the cache, what is scored, and one token more to score the last one by."""

    start: int  # index of its first token in the text
    context: list[int]
    continuation: list[int]
    following: list[int]  # the token after each of the continuation's


def read_text(name: str) -> str:
    """The text of a UTF-8 file, or ``pydoc``: Python's own help topics, joined in the order of their names, or
    ``stdlib``: the source of some of its modules, or ``docstrings``: what its modules say of themselves, in prose.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    if name == STDLIB:
        return "\n\n".join(map(_source, MODULES))
    if name == DOCSTRINGS:
        return "\n\n".join(docstring for docstring in _docstrings() if len(docstring) >= PROSE)
    if name != PYDOC:
        return Path(name).read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[topic] for topic in sorted(topics))


def _docstrings() -> Iterator[str]:
    """Those of Python's own modules, in the order of their names."""
    for module in sorted(sys.stdlib_module_names):
        spec = find_spec(module)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            yield ast.get_docstring(ast.parse(_source(module))) or ""


def _source(module: str) -> str:
    """The source of one of Python's own modules."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"this Python has no source of its module {module}")
    return Path(spec.origin).read_text(encoding="utf-8")


def passages(
    tokens: Sequence[int],
    context: int,
    continuation: int,
    count: int,
    seed: int,
    prefix: Sequence[int] = (),
) -> list[Passage]:
    """`count` passages spread evenly over the text; the seed shifts all of them by the same part of their distance.

    `prefix` is what the tokenizer puts before every text (a BOS token, say); it is part of the context's length.

    Raises:
        ValueError: the passages would overlap, so that they would not be independent measurements.
    """
    length = context - len(prefix) + continuation + 1
    room = len(tokens) // count
    if room < length:
        raise ValueError(
            f"the text has {len(tokens)} tokens, {count} contexts of {length} tokens each do not fit: "
            "give a longer text, fewer contexts or shorter ones"
        )
    shift = random.Random(seed).random()
    result = []
    for i in range(count):
        start = i * room + int(shift * (room - length + 1))
        middle = start + context - len(prefix)
        result.append(
            Passage(
                start=start,
                context=[*prefix, *tokens[start:middle]],
                continuation=list(tokens[middle : middle + continuation]),
                following=list(tokens[middle + 1 : middle + continuation + 1]),
            )
        )
    return result
