"""How the ranks of one engine agree: each compresses its own layers and heads, and either all of it is used or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from vllm.distributed import get_pp_group, get_tp_group
from vllm.distributed.parallel_state import GroupCoordinator

from kvsculpt_vllm.engine.shared.reasons import Outcome, Reason
from kvsculpt_vllm.engine.shared.record import CompressionRecord, of_all_ranks, printable
from kvsculpt_vllm.engine.worker.compressor import reason_of

Told = TypeVar("Told")


@dataclass(frozen=True)
class Failure:
    """Why a compression cannot be used."""

    reason: Reason
    description: str
    error: float = 0.0  # held-out, where it is too large

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Describe an exception in words that may be told to other ranks and stand in the log."""
        return cls(reason_of(error), printable(f"{type(error).__name__}: {error}"))

    @property
    def by_rule(self) -> bool:
        """Whether a rule gave the compression up (it loses too much, or there was no room), and not a fault."""
        return self.reason.outcome == Outcome.FALLBACK


class Ranks:
    """The ranks that hold one model: tensor parallel ones share a pipeline stage's layers, each having some heads.

    Ranks hear the scheduler's commands in one order and end a compression only by agreement, so that all of them come
    to the same exchanges. Messages go over the CPU: a device's queue of work is not waited for.
    """

    def __init__(self) -> None:
        tensor, pipeline = get_tp_group(), get_pp_group()
        self._groups = tensor, pipeline
        self.place = (pipeline.rank_in_group, tensor.rank_in_group)
        self.count = tensor.world_size * pipeline.world_size
        self.number = pipeline.rank_in_group * tensor.world_size + tensor.rank_in_group
        """Of `count`, which one this is."""
        self.is_first = self.place == (0, 0)
        """The one that speaks for all: it logs, and front ends ask it."""
        self.is_heard = pipeline.is_last_rank and tensor.rank_in_group == 0
        """The one whose output vLLM takes to its scheduler."""

    def gather(self, value: Told) -> list[list[Told]]:
        """Every rank's `value`, as [pipeline stage][tensor parallel rank]. Returns once all ranks have come to it."""
        tensor, pipeline = self._groups
        return _gather(pipeline, _gather(tensor, value))


def _gather(group: GroupCoordinator, value: Any) -> list[Any]:
    if group.world_size == 1:
        return [value]
    values = [None] * group.world_size
    dist.all_gather_object(values, value, group=group.cpu_group)
    return values


def agreed(
    outcomes: list[list[CompressionRecord | Failure]], max_error: float
) -> tuple[CompressionRecord | Failure, tuple[int, int]]:
    """What all outcomes, [pipeline stage][tensor parallel rank], come to, and the place of the rank that tells of it.

    The first failure if there is one; else one record of everything, unless that loses more than `max_error`.
    """
    records: list[list[CompressionRecord]] = []
    for stage, ranks in enumerate(outcomes):
        records.append([])
        for rank, outcome in enumerate(ranks):
            if isinstance(outcome, Failure):
                return outcome, (stage, rank)
            records[-1].append(outcome)
    record = of_all_ranks(records)
    if record.error_after > max_error:
        told = f"held-out error {record.error_after:.4g}, at most {max_error:g} is allowed"
        return Failure(Reason.ERROR_BOUND, told, record.error_after), (0, 0)
    return record, (0, 0)
