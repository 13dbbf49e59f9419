"""What a compression did, as logged and reported."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from vllm.logger import init_logger

Number = TypeVar("Number", int, float)

logger = init_logger("vllm.kvsculpt")


@dataclass(frozen=True)
class CompressionRecord:
    """One compression, of one rank or (see `of_all_ranks`) of all. Lists by layer and head are (L, H)."""

    request_id: str
    method: str  # whose entries are in use: after a fallback not the one that was asked for
    keep_ratio: float
    budget: str
    effort: str
    prompt_tokens: int
    span_tokens: int
    entries_kept: float  # mean over layers and KV heads
    blocks_before: int  # that the prompt held
    blocks_after: int  # that it holds now: packed and tail
    blocks_freed: int  # by which the pool's free count rose (shared blocks stay in use)
    bytes_freed: int  # on all ranks
    steps_waited: int  # scheduler steps spent uncompressed because no block was free, or because blocks were shared
    seconds: float  # of the slowest rank
    error_before: float  # held-out loss of plain selection, mean over heads
    error_after: float  # held-out loss of what was written
    solver_steps: int  # key steps, summed over heads
    heads_at_start: int  # (layer, KV head)s for which selection was not beaten
    failed_solves: int  # systems of the values that could not be factored, so that the values stayed
    budgets: list[list[int]]  # entries kept by layer and head
    errors: list[list[float]]  # held-out loss by layer and head, after
    fallback: str = ""  # why selection took the place of the method that was asked for
    segments: int = 1  # made for the request, one after the other; the figures are of all of them
    times_made: int = 1  # solves, more than segments where one lost too much and was made again with more entries

    def summary(self) -> dict:
        """Everything but the lists, for tables of many requests."""
        return {name: value for name, value in asdict(self).items() if name not in ("budgets", "errors")}


def of_all_ranks(ranks: list[list[CompressionRecord]]) -> CompressionRecord:
    """One record of what all ranks, [pipeline stage][tensor parallel rank], did with their layers and heads.

    Heads that several ranks hold copies of, where there are more ranks than KV heads, are listed once for each.
    """
    everyone = [record for stage in ranks for record in stage]
    heads = [sum(map(len, record.errors)) for record in everyone]

    def mean(name: str) -> float:
        parts = (getattr(record, name) * count for record, count in zip(everyone, heads, strict=True))
        return sum(parts) / sum(heads)

    def joined(lists: list[list[list[list[Number]]]]) -> list[list[Number]]:
        """Lists by [stage][rank][layer][head] as [layer][head]."""
        return [[head for row in rows for head in row] for stage in lists for rows in zip(*stage, strict=True)]

    return replace(
        everyone[0],
        entries_kept=mean("entries_kept"),
        error_before=mean("error_before"),
        error_after=mean("error_after"),
        solver_steps=sum(record.solver_steps for record in everyone),
        heads_at_start=sum(record.heads_at_start for record in everyone),
        failed_solves=sum(record.failed_solves for record in everyone),
        budgets=joined([[record.budgets for record in stage] for stage in ranks]),
        errors=joined([[record.errors for record in stage] for stage in ranks]),
        seconds=max(record.seconds for record in everyone),
    )


def of_all_segments(before: CompressionRecord, new: CompressionRecord) -> CompressionRecord:
    """One record of the segments that were made for a request, and of a new one behind them. Errors are means over the
    tokens.
    """
    tokens = before.span_tokens + new.span_tokens
    share = new.span_tokens / tokens

    def mean(old: float, own: float) -> float:
        return (1 - share) * old + share * own

    return replace(
        new,
        span_tokens=tokens,
        entries_kept=before.entries_kept + new.entries_kept,
        blocks_before=before.blocks_before,
        blocks_freed=before.blocks_freed + new.blocks_freed,
        bytes_freed=before.bytes_freed + new.bytes_freed,
        steps_waited=before.steps_waited + new.steps_waited,
        seconds=before.seconds + new.seconds,
        error_before=mean(before.error_before, new.error_before),
        error_after=mean(before.error_after, new.error_after),
        solver_steps=before.solver_steps + new.solver_steps,
        heads_at_start=before.heads_at_start + new.heads_at_start,
        failed_solves=before.failed_solves + new.failed_solves,
        budgets=[[a + b for a, b in zip(*row, strict=True)] for row in zip(before.budgets, new.budgets, strict=True)],
        errors=[[mean(a, b) for a, b in zip(*row, strict=True)] for row in zip(before.errors, new.errors, strict=True)],
        fallback=before.fallback or new.fallback,
        segments=before.segments + new.segments,
        times_made=before.times_made + new.times_made,
    )


def printable(text: str) -> str:
    """`text` as it may stand in a log line: request ids come from clients, and must not break lines or color them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def log(record: CompressionRecord) -> None:
    """The one line a compressed request leaves in the log."""
    logger.info(
        "kvsculpt: request %(request_id)s: %(method)s/%(budget)s, span %(span_tokens)d tokens, "
        "%(entries_kept).0f entries kept a head, %(blocks_freed)d blocks freed (%(blocks_before)d -> "
        "%(blocks_after)d), %(seconds).2f s, held-out error %(error_before).4f -> %(error_after).4f",
        record.summary() | {"request_id": printable(record.request_id)},
    )
