"""What heads would ask if the prompt were read a second time, foretold from what they asked the first time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.selection import Ranking, rank_in_slices
from kvsculpt_vllm.sculpt.slices import Slices, within
from kvsculpt_vllm.sculpt.transfer import on_device

if TYPE_CHECKING:
    from kvsculpt_vllm.sculpt.problem import Problems

SHARPLY = 8
"""Entries are ordered by the sum of this power of the attention that foretold queries give them: nearly by the most
that one of them gives. What is copied is read once, by one query."""

FIRST = 0.25
"""A head's first entries, this share of all, are chosen by the prompt's own queries alone: what follows a prompt needs
them more than what copies does, and with so few entries hardly anything is copied right (benchmarks/LOG.md)."""

FOUND_IN = 2
"""Of the entries that a second reading wants foretold queries find most (87 %) in so many times as many."""


@dataclass(frozen=True)
class QueryMaps:
    """For some heads: linear maps that make of the query which a head asked at a token, the one that it asks there when
    the context is read again, in order to copy it.

    A token's query in a second reading looks for the token itself in the first, and for what came after it there. In a
    first reading hardly any query does: nothing has come before. So entries that an answer copies, and that nothing
    else in the prompt looks for, would be dropped. A prompt is not read twice for that (KVzip, arXiv 2505.23416, does
    it): what the second reading does to a query is mostly the same at every token. `kvsculpt calibrate` learns it.
    """

    heads: tuple[int, ...]  # the N problems that have maps, by their numbers, ascending
    maps: Tensor  # (N, G, D + 1, D) fp32, for each query head of the group; the last of D + 1 rows is added
    wanted: tuple[float, ...]  # N shares from 0 to 1: how many of its entries a second reading wants of the head

    def part(self, own: slice) -> QueryMaps:
        """Keep the maps of the problems in `own`, which are numbered from 0 then."""
        kept = [i for i, number in enumerate(self.heads) if own.start <= number < own.stop]
        heads, wanted = (tuple(some[i] for i in kept) for some in (self.heads, self.wanted))
        return QueryMaps(tuple(head - own.start for head in heads), self.maps[kept], wanted)

    def apply(self, which: Sequence[int], queries: Tensor) -> Tensor:
        """Foretell queries (b, P, G, D) by `which` of the N maps from those asked in the first reading, of the same
        shape; both as they are at position 0.
        """
        maps = on_device(self.maps[list(which)], queries.device).flatten(0, 1)
        by_head = queries.transpose(1, 2)  # (b, G, P, D)
        foretold = torch.baddbmm(maps[:, -1:], by_head.flatten(0, 1), maps[:, :-1])
        return foretold.view(by_head.shape).transpose(1, 2)


def interleaved(first: Tensor, second: Tensor, wanted: Sequence[float]) -> Tensor:
    """Mix two orders (B, n) of the same entries, of which `wanted` (B,) are shares that the second one is asked for.

    The first `FIRST` of the entries are the first order's. Then the second one's come, until there are as many of
    either, and then one of each in turn; but of the second order no more than `FOUND_IN` times the wanted ones are
    taken, and the rest are the first order's again. What is early in both takes one place, and others move up.
    """
    number = first.shape[1]
    alone = int(FIRST * number)
    place = torch.arange(number)  # here and below on the host, which spares a GPU twenty small kernels
    limits = torch.tensor([[int(FOUND_IN * share * number)] for share in wanted])
    # Places in the mixed order if no entry were early in both. Doubled, so that no two entries have the same one.
    of_first = 2 * (place + torch.where(place < alone, 0, torch.minimum(place, limits)))
    of_second = torch.where(place < limits, 2 * (place + place.clamp_min(alone)) + 1, 4 * number)
    places = on_device(torch.stack([of_first, of_second]), first.device)
    by_entry = torch.empty_like(places).scatter_(2, torch.stack([first, second]), places)
    return by_entry.amin(0).argsort(dim=1)


def order_in_slices(problems: Problems, ranking: Ranking, maps: QueryMaps, limit: int) -> Slices[Ranking]:
    """Order the entries of the heads that have `maps` by foretold queries, too.

    Raises:
        ValueError: it is not known of these problems what was asked first.
    """
    if problems.foretell is None:
        raise ValueError("foretold queries: of these problems it is not known what was asked in the first reading")
    if not maps.heads:
        return ranking
    asked = yield from problems.foretell(maps)
    nothing = torch.arange(0)  # what would be answered does not matter
    second = yield from within(fast_matmul, rank_in_slices(asked, limit, power=SHARPLY, answered=nothing))
    own, order = on_device(maps.heads, ranking.order.device), ranking.order.clone()
    order[own] = interleaved(order[own], second.order, maps.wanted)
    return replace(ranking, order=order)
