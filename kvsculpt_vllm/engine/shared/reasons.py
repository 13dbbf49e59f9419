"""What can become of a request's prompt, and why. Metrics, logs and docs take their words from here."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Outcome(StrEnum):
    """What became of a prompt."""

    meaning: str

    def __new__(cls, name: str, meaning: str) -> Self:
        member = str.__new__(cls, name)
        member._value_, member.meaning = name, meaning
        return member

    COMPRESSED = "compressed", "the method's entries are in use"
    FOUND = "found", "a packed prefix that was made for another request is in use"
    SKIPPED = "skipped", "not tried, and exact"
    FALLBACK = "fallback", "tried and given up by a rule, so that the exact cache or selection is in use"
    FAILED = "failed", "the solve raised or was not finite, and the exact cache is in use"
    DEFERRED = "deferred", "goes on uncompressed for a while, and is looked at again at every step"


class Reason(StrEnum):
    """Why a prompt is not compressed, or not yet."""

    outcome: Outcome
    """What it leads to. After a failure selection may take the place of the method: then the outcome is `FALLBACK`."""
    meaning: str

    def __new__(cls, name: str, outcome: Outcome, meaning: str) -> Self:
        member = str.__new__(cls, name)
        member._value_, member.outcome, member.meaning = name, outcome, meaning
        return member

    CACHED = "cached", Outcome.FOUND, "it was found in the prefix cache, so that its tokens were not computed"
    ADOPTED = "adopted", Outcome.FOUND, "the prompt was computed, and another one's was sculpted that begins alike"
    OFF = "off", Outcome.SKIPPED, "compression is off for the request"
    SHORT = "short", Outcome.SKIPPED, "the prompt has fewer tokens than `min_tokens`"
    NOTHING_TO_FREE = "nothing_to_free", Outcome.SKIPPED, "keep ratio 1, or a span of one block"
    REPETITION = (
        "repetition",
        Outcome.SKIPPED,
        "the prompt is a few tokens over and over, whose queries tell nothing of what an answer will ask",
    )
    FEW_OUTPUT_TOKENS = (
        "few_output_tokens",
        Outcome.SKIPPED,
        "the answer is over before anything would read a packed prefix",
    )
    NO_SAMPLING = (
        "no_sampling",
        Outcome.SKIPPED,
        "not a request for text, or a streaming session, whose prompt is never complete",
    )
    ENDED_FIRST = "ended_first", Outcome.SKIPPED, "finished or aborted before its turn came, or before it was through"
    ERROR_BOUND = "error_bound", Outcome.FALLBACK, "its held-out error is above `max_error`"
    NO_ROOM_FOR_QUERIES = (
        "no_room_for_queries",
        Outcome.FALLBACK,
        "too many prompts at once are computed or wait for their compression",
    )
    NO_ROOM = (
        "no_room",
        Outcome.FALLBACK,
        "of a prefix that is sculpted by name: the pool has no room for its entries beside the blocks they replace",
    )
    SHARED_BLOCKS = (
        "shared_blocks",
        Outcome.SKIPPED,
        "other requests share its blocks, so that letting go of them would free no more than the packed prefix takes; "
        "while they run it is deferred, and it is skipped where it ends before them",
    )
    EXCEPTION = "exception", Outcome.FAILED, "the solve raised an error, which the log shows"
    OUT_OF_MEMORY = "out_of_memory", Outcome.FAILED, "the solve found no memory"
    NOT_FINITE = "not_finite", Outcome.FAILED, "what the solve gave has numbers that are not finite"
    QUERIES_MISSING = (
        "queries_missing",
        Outcome.FAILED,
        "queries could not be sampled while the prompt was computed",
    )
    ENDS_TOO_SOON = (
        "ends_too_soon",
        Outcome.DEFERRED,
        "beside the other requests its answer would be over before its compression",
    )
    NO_FREE_BLOCKS = (
        "no_free_blocks",
        Outcome.DEFERRED,
        "the pool has no room for the packed prefix beside the blocks it will replace",
    )


MEANINGS = {reason.value: reason.meaning for reason in Reason}
"""By the name, as reports and metrics have it."""
