"""What scheduler and workers tell each other, attached to vLLM's scheduler output and model runner output.

A compression has two phases. The scheduler takes blocks for a packed prefix and has the workers *solve*: they fill
those blocks, and nothing else changes. Once it hears that they did, it *commits*: the request's block list is
rewritten, and the blocks of its span go back to the pool. Until then the exact cache is there, and a solve that fails
costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvsculpt_vllm.engine.shared.reasons import Outcome, Reason

_ATTRIBUTE = "kv_compression"


@dataclass(frozen=True)
class SolveCommand:
    """Compress one request into blocks of its own, before the next forward pass. Block ids are those of vLLM's pool."""

    request_id: str
    attempt: int  # tells the answers to different commands for one request apart
    num_prompt_tokens: int
    span_tokens: int
    prompt_blocks: list[int]  # the blocks that hold the prompt: the span's, then the tail's
    packed: list[int]  # the blocks to fill


@dataclass(frozen=True)
class CancelCommand:
    """Stop working on a request, or forget what was solved: the blocks that were taken for it are others' now. Its
    queries are kept, so that it can be compressed later.
    """

    request_id: str


@dataclass(frozen=True)
class CommitCommand:
    """From this step on, read what was solved: whoever's block list begins with it."""

    request_id: str  # it was solved for
    first_block: int  # of the packed prefix
    rows: dict[str, list[int]]
    """New block lists: packed, then null (0) up to the span's length, then the tail. Of the request itself, unless it
    has lost its blocks in this very step, and of those that adopt its packed prefix."""
    blocks_freed: int  # by how much the pool's free count rose
    steps_waited: int  # scheduler steps in which it could not begin: no blocks were free, or its own were shared


@dataclass(frozen=True)
class AdoptCommand:
    """These requests' block lists begin with a packed prefix of another one's from now on."""

    rows: dict[str, list[int]]


@dataclass(frozen=True)
class ForgetCommand:
    """These first blocks of packed prefixes hold something else from now on."""

    first_blocks: list[int]


@dataclass(frozen=True)
class Solved:
    """A worker's answer to a `SolveCommand`."""

    request_id: str
    attempt: int
    succeeded: bool = True  # or nothing was written that may be used
    seconds: float = 0.0  # that it took, on the slowest rank
    error: float = 0.0  # held-out
    by_method: bool = True  # it is what was asked for, and not selection after a failure
    reason: Reason | None = None  # why it failed


@dataclass(frozen=True)
class Settled:
    """For the books: the scheduler decided about a request without a solve that counts."""

    request_id: str
    num_prompt_tokens: int
    outcome: Outcome
    reason: Reason


@dataclass(frozen=True)
class Deferred:
    """For the books: a request waits for the first time, uncompressed and running."""

    request_id: str
    num_prompt_tokens: int
    reason: Reason


@dataclass(frozen=True)
class PoolState:
    """For the books: vLLM's block pool after a step was scheduled."""

    total: int  # blocks there are for requests: all but the null block
    used: int
    saved: int  # that stock vLLM would hold besides; below 0 where it would hold fewer, as while a prompt is solved
    compressed: int  # requests whose prompt is compressed now
    pending: int  # requests whose prompt is computed and waits for its compression, or is in it
    segments: int = 0  # packed prefixes that can be found


@dataclass(frozen=True)
class Pace:
    """For how long the workers may go on with the compression in hand before this step."""

    alone: bool  # nobody else runs or waits, so that a long slice holds nobody up


def attach(carrier: Any, messages: list[Any]) -> None:
    """Send `messages` along; a plain attribute survives pickling."""
    setattr(carrier, _ATTRIBUTE, messages)


def attached(carrier: Any) -> list[Any]:
    """The messages that came along."""
    return getattr(carrier, _ATTRIBUTE, [])
