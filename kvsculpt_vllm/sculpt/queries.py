"""Choose the queries that the problems of a prompt are fitted to, and build the problems."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.foretold import QueryMaps
from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.memory import max_elements
from kvsculpt_vllm.sculpt.problem import Earlier, Problems, retained_attention, thin_positions
from kvsculpt_vllm.sculpt.rotary import Rotary
from kvsculpt_vllm.sculpt.slices import Slices, at_once, within
from kvsculpt_vllm.sculpt.transfer import on_device

FUTURE_TOKENS = 512
"""Synthetic queries ask from this many positions after the prompt's end."""

HELD_OUT_EVERY = 7
"""One sampled position in so many is never fitted to, only judged on."""

RECENT_POSITIONS = 64
"""The prompt's last queries are asked twice: from the future, and as they were."""

REQUEST_TOKENS = 8
"""So many tokens, about, ask for a second reading."""


def sample_positions(first: int, num_prompt_tokens: int, count: int) -> tuple[Tensor, int]:
    """Choose the positions of a prompt whose queries are kept.

    The last ones are the end of the prompt without a gap: at most a quarter of `count`, and at most `RECENT_POSITIONS`.
    The others are spread evenly over the computed tokens before them.

    Args:
        first: the first position that is computed; what a prefix-cache hit covers never is.
        num_prompt_tokens: the prompt's length.
        count: how many positions to keep at most.

    Returns:
        The positions (P,) int64, ascending, and how many of the last ones are recent.
    """
    available = num_prompt_tokens - first
    count = min(count, available)
    recent = min(RECENT_POSITIONS, max(1, count // 4))
    spread = count - recent
    end = num_prompt_tokens - recent - 1
    # In float64: float32 rounds two neighbours to one position where they are many and far from 0.
    earlier = torch.linspace(first, end, spread, dtype=torch.float64).round().long() if spread else None
    last = torch.arange(num_prompt_tokens - recent, num_prompt_tokens)
    return (last if earlier is None else torch.cat([earlier, last])), recent


def future_positions(origin: Tensor, end: int, num_positions: int, followed: bool = False) -> Tensor:
    """Choose, for every sampled query, a position from `end` on, behind the segment's window, from which the fit lets
    it ask.

    The packed entries will be read by the queries of the answer, which nobody knows yet. Sampled queries of the prompt
    stand in for them: the rotary embedding moves each from its own position in `origin` (P,) int64 to one behind the
    end. A moved query still looks for what it looked for. Say its own position is p, and it looks for the token that
    followed an earlier occurrence of its token. From behind the end it also finds the token after p, as the same query
    will if its token comes again in the answer. So a sampled position makes the fit keep what follows it, and what
    follows a position that is not sampled is not kept.

    The positions (P,) int64 that are returned spread over the `FUTURE_TOKENS` behind the end. Those for a segment that
    is `followed` by others begin where those end and are log-uniformly distant, as far as the model's rotary embedding
    goes, which ends at `num_positions`: the answer reads such a segment from afar, and what is asked from near would
    keep its end. Measured on two texts (benchmarks/LOG.md): from 512 on takes 32 and 27 % off what the third of four
    segments loses where queries begin right behind it; single spans, which are read from near, lose by being asked from
    afar. This choice is ours, not KVSculpt's (docs/algorithm.md#which-queries).
    """
    # A fixed pseudo-random spread, so that neighbouring origins ask from unrelated distances.
    spread = torch.arange(len(origin), device=origin.device) * 193 % FUTURE_TOKENS
    room = max(1, num_positions - end)
    if followed:
        nearest = min(FUTURE_TOKENS, max(1, room // 2))
        distances = (nearest * torch.exp(spread.double() / FUTURE_TOKENS * math.log(room / nearest))).long()
    else:
        distances = spread * min(FUTURE_TOKENS, room) // FUTURE_TOKENS
    return (end + distances).clamp_max(num_positions - 1)


class Asked(Protocol):
    """Queries (L, P, heads, D) of all layers: a tensor, or what puts some heads' together when it is asked for them."""

    @property
    def shape(self) -> Sequence[int]:
        """(L, P, heads, D)."""

    def __getitem__(self, which: tuple[Tensor, slice, Tensor], /) -> Tensor:
        """Give, for `layers` (b, 1) and `heads` (b, G), ``queries[layers, :, heads]``, which is (b, G, P, D)."""


Turns = dict[tuple[Rotary, int | None], tuple[Tensor, Tensor]]
"""The `Rotary.turn` of a layer's embedding that takes a segment's queries to where they are asked, for a `count`."""


def build_in_slices(
    queries: Asked,  # (L, P, heads, D): sampled queries, with their rotary embedding, in any dtype
    positions: Tensor,  # (P,) where they were asked, ascending
    recent: int,  # how many of the last ones are asked as they were, too
    keys: Tensor,  # (L·H, n, D) the keys of the tokens [first, first + n)
    values: Tensor,  # (L·H, n, D)
    span: int,  # the first so many of these tokens are compressed, the others are the exact recent window
    sinks: int,  # the first so many tokens of the span stay exact
    rotaries: Sequence[Rotary | None],  # per layer, None where queries do not depend on the position
    scale: float,
    *,
    first: int = 0,
    earlier: Earlier | None = None,  # of all L·H problems: what stands for the tokens before `first`
    sink_logits: Tensor | None = None,  # (L, heads) fp32: what each query head's learned sink has as its logit
    soft_cap: float | None = None,  # of all layers' logits
    followed: bool = False,  # whether other segments come behind this one
    numbers: Sequence[int] | None = None,  # build only these of the L·H problems, ascending; None means all
    count: int | None = None,  # build only about so many of the queries of each head; None means all
    turns: Turns | None = None,  # filled by the calls before this one for the same segment, and by this one
) -> Slices[Problems]:
    """Build the problems of a segment of a prompt, one per (layer, KV head), layers outermost; the work may pause after
    some of them. A prompt that is compressed as one span is its only segment.

    A problem has the queries of all heads of its KV head's group. Each sampled query asks from a position behind the n
    tokens (`future_positions`); the last `recent` ones ask from their own position, too. So a problem has (P + recent)
    · group query rows, or with a `count` those of them that `Problems.thin_rows` would choose. All positions are
    absolute.

    A caller that goes through the model some problems at a time (`numbers`) bounds the memory that they take. The other
    arguments stay those of the whole model, and nothing of the other problems is read.
    """
    end, origin = first + keys.shape[1], positions.cpu()
    # Of the whole model, so that a group of layers has the same positions as all of them at once.
    covered = [rotary.num_positions for rotary in rotaries if rotary is not None]
    future = future_positions(origin, end, min(covered, default=end + FUTURE_TOKENS), followed)
    held_out = held_out_of(len(origin))
    # A query that is asked twice is held out twice or not at all.
    held_out = torch.cat([held_out, held_out[-recent:]])
    asked_at = torch.cat([future, origin[-recent:]])
    asked = torch.arange(len(origin))
    asked = torch.cat([asked, asked[-recent:]])  # (A,): which query is asked there
    if count is not None:
        kept = thin_positions(held_out, count)
        held_out, asked_at, asked = held_out[kept], asked_at[kept], asked[kept]
    turns = {} if turns is None else turns
    for rotary in rotaries:
        if rotary is not None and (rotary, count) not in turns:
            turns[rotary, count] = rotary.turn(on_device(origin[asked], keys.device), on_device(asked_at, keys.device))
    which = on_device(asked, keys.device)

    heads = len(keys) // len(rotaries)

    def rotaries_of(own: Sequence[int]) -> list[Rotary | None]:
        return [rotaries[number // heads] for number in own]

    def ask(own: Sequence[int], rows: Tensor) -> Tensor:
        return _turned(rows[:, which].float(), rotaries_of(own), turns, count)

    build = partial(
        _asked_in_slices,
        queries,
        keys=keys,
        values=values,
        span=span,
        sinks=sinks,
        scale=scale,
        first=first,
        earlier=earlier,
        sink_logits=sink_logits,
        soft_cap=soft_cap,
    )
    problems = yield from within(fast_matmul, build(asked_at, held_out, numbers=numbers, ask=ask))
    if count is not None:
        return replace(problems, followed=followed)

    def foretell(maps: QueryMaps) -> Slices[Problems]:
        every = range(len(keys)) if numbers is None else numbers
        mapped = [every[number] for number in maps.heads]
        # As far behind its first place as the end of a second reading's request is behind the prompt's beginning.
        again = (origin + (end - first + REQUEST_TOKENS)).clamp_max(min(covered, default=sys.maxsize) - 1)
        there: Turns = {}
        back: Turns = {}
        nowhere = torch.zeros_like(origin)
        # Both turns at once, which halves the launches: back to no position, and from there to where they ask again.
        ends = torch.stack([torch.cat([origin, nowhere]), torch.cat([nowhere, again])])
        before, after = on_device(ends, keys.device)
        for rotary in _distinct(rotaries_of(mapped)):
            turns = [half.chunk(2) for half in rotary.turn(before, after)]
            back[rotary, None], there[rotary, None] = zip(*turns, strict=True)

        def ask_again(own: Sequence[int], rows: Tensor) -> Tensor:
            plain = _turned(rows.float(), rotaries_of(own), back, None)
            foretold = maps.apply([mapped.index(number) for number in own], plain)
            return _turned(foretold, rotaries_of(own), there, None)

        asked = build(again, torch.zeros(len(again), dtype=torch.bool), numbers=mapped, ask=ask_again)
        return (yield from within(fast_matmul, asked))

    return replace(problems, recent=recent, followed=followed, foretell=foretell)


def held_out_of(count: int) -> Tensor:
    """Say of each of `count` sampled positions whether it is held out (count,) bool, on the host: judged on and never
    fitted to.
    """
    return torch.arange(count) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def _asked_in_slices(
    queries: Asked,  # (L, P, heads, D)
    positions: Tensor,  # (A,) where they are asked, on the host
    held_out: Tensor,  # (A,) bool, on the host
    *,
    keys: Tensor,
    values: Tensor,
    span: int,
    sinks: int,
    scale: float,
    first: int = 0,
    earlier: Earlier | None = None,
    sink_logits: Tensor | None = None,
    soft_cap: float | None = None,
    numbers: Sequence[int] | None = None,
    ask: Callable[[Sequence[int], Tensor], Tensor] = lambda own, rows: rows.float(),
) -> Slices[Problems]:
    """Build the problems, one per (layer, KV head), whose queries are given; the work may pause after some of them.

    `build_in_slices` gives a prompt's own queries, `evaluation.calibrate` those of a second reading. What a query (b,
    P, G, D) of some problems asks (b, A, G, D), in float32, `ask` says.

    Raises:
        ValueError: `numbers` is empty, does not ascend or leaves the model; `earlier` or `sink_logits` is not of all
            the model's problems or query heads.
    """
    total, device = len(keys), keys.device
    numbers = range(total) if numbers is None else numbers
    if not numbers or numbers[0] < 0 or numbers[-1] >= total or any(a >= b for a, b in pairwise(numbers)):
        raise ValueError(f"{list(numbers)} are not ascending numbers of problems of a model that has {total}")
    if earlier is not None and not len(earlier.keys) == len(earlier.values) == total:
        raise ValueError(
            f"earlier entries of {len(earlier.keys)} and {len(earlier.values)} problems were given for {total}"
        )
    num_layers, _, query_heads, head_size = queries.shape
    if sink_logits is not None and sink_logits.shape != (num_layers, query_heads):
        expected = (num_layers, query_heads)
        raise ValueError(f"sink_logits: shape {tuple(sink_logits.shape)} given, expected {expected}, one a query head")
    heads, group = total // num_layers, query_heads * num_layers // total
    recent_positions = torch.arange(first + span, first + keys.shape[1], device=device)
    asked_at = on_device(positions.repeat_interleave(group), device)
    which = _consecutive(numbers, device)
    # Filled part by part: parts that are joined at the end would all be there twice.
    shape = (len(numbers), len(positions) * group, head_size)
    built = Problems(
        queries=torch.empty(shape, device=device),
        keys=keys[which, sinks:span],
        values=values[which, sinks:span],
        retained_out=torch.empty(shape, device=device),
        retained_lse=torch.empty(shape[:2], device=device),
        held_out=held_out.repeat_interleave(group),
        scale=scale,
        soft_cap=soft_cap,
        group=group,
    )
    # In parts: for the whole model at once the scores of a wide window would take gigabytes.
    most = max(1, max_elements(device) // (2 * shape[1] * head_size))  # several temporaries live at once
    for begin in range(0, len(numbers), most):
        own = numbers[begin : begin + most]
        layers, mine = [number // heads for number in own], slice(begin, begin + len(own))
        of_layer = on_device([[layer] for layer in layers], device)
        of_heads = on_device([[number % heads * group + i for i in range(group)] for number in own], device)
        asked = ask(own, queries[of_layer, :, of_heads].transpose(1, 2))  # (b, A, G, D)
        rows = built.queries[mine]
        rows.view(asked.shape).copy_(asked)
        del asked
        part = _consecutive(own, device)
        built.retained_out[mine], built.retained_lse[mine] = retained_attention(
            rows,
            asked_at,
            keys[part, :sinks],
            values[part, :sinks],
            keys[part, span:],
            values[part, span:],
            recent_positions,
            scale,
            None if earlier is None else earlier.part(own),
            # A position's rows are those of the group's query heads, in their order.
            None if sink_logits is None else sink_logits[of_layer, of_heads].repeat(1, len(positions)),
            soft_cap,
        )
        yield
    return built


asked_problems = at_once(_asked_in_slices)
build_problems = at_once(build_in_slices)


def _distinct(rotaries: Sequence[Rotary | None]) -> Iterable[Rotary]:
    """Each of them once: layers often share one."""
    return {id(rotary): rotary for rotary in rotaries if rotary is not None}.values()


def _consecutive(numbers: Sequence[int], device: torch.device) -> slice | Tensor:
    """What indexes the `numbers`: a slice, of which a view is made, if there are no gaps."""
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(numbers[0], numbers[-1] + 1)
    return on_device(numbers, device)


def _turned(rows: Tensor, rotaries: Sequence[Rotary | None], turns: Turns, count: int | None) -> Tensor:
    """Queries (b, A, G, D), the b-th of them of a layer with the b-th of `rotaries`, where they are asked.

    Without a rotary embedding a query is the same wherever it is asked, and only sees more of the recent window.
    """
    first = rotaries[0]
    if all(rotary is first for rotary in rotaries):  # as in most models
        return rows if first is None else first.turned(rows, turns[first, count])
    for rotary in _distinct(rotaries):
        mine = on_device([b for b, other in enumerate(rotaries) if other is rotary], rows.device)
        rows[mine] = rotary.turned(rows[mine], turns[rotary, count])
    return rows
