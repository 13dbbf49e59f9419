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
from kvsculpt_vllm.store.names import StoredName

_ATTRIBUTE = "kv_compression"


@dataclass(frozen=True)
class SampleCommand:
    """Keep the queries of these positions of a request, all of which this step computes."""

    request_id: str
    first: int
    end: int


@dataclass(frozen=True)
class UnsampleCommand:
    """The queries that are kept of these requests are not needed any more."""

    request_ids: list[str]


@dataclass(frozen=True)
class SolveCommand:
    """Compress some tokens of a request into blocks of its own, before the next forward pass. Block ids are those of
    vLLM's pool.
    """

    request_id: str
    attempt: int  # tells the answers to different commands for one request apart
    num_prompt_tokens: int
    first_token: int  # that the segment is to stand for
    span_tokens: int  # how many it is to stand for, whole blocks
    window: int  # tokens behind them that count as its exact surroundings
    exact: list[int]  # the blocks that hold all of these tokens
    earlier: list[list[int]]  # packed blocks of the segments before it
    packed: list[int]  # the blocks to fill
    blocks_held: int  # by the request now, those to be filled aside
    followed: bool = False  # whether other segments are to come behind this one


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
    packed: list[int]  # the segment's blocks
    rows: dict[str, list[int]]
    """New block lists: for each segment its packed blocks and null (0) up to its length, then the tail. Of the request
    itself, unless it has lost its blocks in this very step, and of those that adopt the segment."""
    samples_from: dict[str, int]  # queries of positions before this one are not needed any more, by request
    blocks_freed: int  # by how much the pool's free count rose
    steps_waited: int  # scheduler steps in which it could not begin: no blocks were free, or its own were shared
    times_made: int = 1  # more than once where it lost too much
    first_of_request: bool = True  # or the request has segments already
    store_as: StoredName | None = None  # to be written to the store under this name


@dataclass(frozen=True)
class AdoptCommand:
    """These requests' block lists have another one's segment from now on."""

    rows: dict[str, list[int]]
    samples_from: dict[str, int]  # queries of positions before this one are not needed any more, by request


@dataclass(frozen=True)
class LoadCommand:
    """Read segments from the store into blocks that were taken for them, and publish as many as can be read: the first
    ones, as each follows the one before it.
    """

    number: int  # tells loads apart
    names: list[StoredName]
    packed: list[list[int]]  # the blocks to fill, by segment


@dataclass(frozen=True)
class CancelLoadCommand:
    """A load is not wanted any more, and its blocks are others' now, whether it was published or not."""

    number: int
    first_blocks: list[int]  # of its segments


@dataclass(frozen=True)
class ForgetCommand:
    """These first blocks of segments hold something else from now on."""

    first_blocks: list[int]


@dataclass(frozen=True)
class Solved:
    """A worker's answer to a `SolveCommand`."""

    request_id: str
    attempt: int
    succeeded: bool = True  # or nothing was written that may be used
    seconds: float = 0.0  # that it took, on the slowest rank
    error: float = 0.0  # held-out; also of what lost more than `max_error`
    by_method: bool = True  # it is what was asked for, and not selection after a failure
    reason: Reason | None = None  # why it failed
    told: bool = False  # the books have heard of the failure


@dataclass(frozen=True)
class Loaded:
    """A worker's answer to a `LoadCommand`."""

    number: int
    usable: int  # segments, of the first ones, that all ranks have read and published
    broken: bool = False  # the next one's file can never be used, on some rank


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
    segments: int = 0  # that can be found


@dataclass(frozen=True)
class SegmentCounts:
    """For the books: what became of segments since the engine's start."""

    hits: int = 0  # requests that found a chain when they got their first blocks
    misses: int = 0  # and those that could have found one, and did not
    adopted: int = 0  # segments that a running request took in the place of tokens that it had computed
    evicted: int = 0  # that could be found, and cannot any more
    tokens_found: int = 0  # that were not computed, or not sculpted
    store_hits: int = 0  # look-ups in the store that found segments
    store_misses: int = 0  # and those that found none
    read: int = 0  # segments that were read from the store
    unreadable: int = 0  # and those that were found there and could not be used


@dataclass(frozen=True)
class StoreState:
    """For the books: how the store fares at which the scheduler looks segments up. Workers read and write by
    themselves.
    """

    failures: int = 0  # look-ups that the file system has refused, since the engine's start
    unanswered: int = 0  # that the store has not answered in time, or was not asked
    away: bool = False  # it is left alone now


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
