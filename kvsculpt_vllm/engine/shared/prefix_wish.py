"""The wish to have a prefix sculpted and kept, without an answer: what an engine's request carries for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads files first
    from vllm import SamplingParams

WISH_KEY = "kvsculpt_prefix"
"""The entry of a request's extra arguments. A client cannot send it: only wishes that were granted pass."""

TOKENS = 2
"""Of the answer: the first comes with the prompt, and then the request waits until its last segment is made."""


@dataclass(frozen=True)
class Wish:
    """Keep the beginning of a prompt."""

    prefix_id: str
    name: str = ""
    pin: bool = False  # it is not evicted
    ttl: float | None = None  # seconds for which it is kept as one, and pinned

    def as_extra_arg(self) -> dict[str, Any]:
        """The entry."""
        return {WISH_KEY: asdict(self)}


_granted: dict[str, Wish] = {}


@contextmanager
def granted(wish: Wish, settings: Mapping[str, Any] | None = None) -> Iterator[SamplingParams]:
    """Let a wish of this process pass: with the parameters that are yielded a request carries it, and `settings` of
    compression beside it.
    """
    from vllm import SamplingParams

    _granted[wish.prefix_id] = wish
    try:
        extra_args = {**(settings or {}), **wish.as_extra_arg()}
        yield SamplingParams(max_tokens=TOKENS, ignore_eos=True, detokenize=False, extra_args=extra_args)
    finally:
        del _granted[wish.prefix_id]


def is_forged(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request carries a wish that this process has not granted."""
    given = (extra_args or {}).get(WISH_KEY)
    return given is not None and given not in [asdict(wish) for wish in _granted.values()]


def wish_of(extra_args: Mapping[str, Any] | None) -> Wish | None:
    """The wish that a request's extra arguments carry."""
    given = (extra_args or {}).get(WISH_KEY)
    return None if given is None else Wish(**given)
