"""Choose the queries that the problems of a prompt are fitted to, and build the problems."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.problem import Earlier, Problems, retained_attention, thin_positions
from kvsculpt_vllm.sculpt.rotary import Rotary
from kvsculpt_vllm.sculpt.slices import Slices, at_once

FUTURE_TOKENS = 512
"""Synthetic queries ask from this many positions after the prompt's end."""

HELD_OUT_EVERY = 7
"""One sampled position in so many is never fitted to, only judged on."""

RECENT_POSITIONS = 64
"""The prompt's last queries are asked twice: from the future, and as they were."""


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
    is `followed` by others are log-uniformly distant, as far as the model's rotary embedding goes, which ends at
    `num_positions`: the answer reads such a segment from afar. Measured (benchmarks/LOG.md): in chains of 7,900 tokens
    that takes 15 and 32 % off the KL; single spans, which are read from near, would lose 12 and 22 %. This choice is
    ours, not KVSculpt's (docs/algorithm.md#which-queries).
    """
    # A fixed pseudo-random spread, so that neighbouring origins ask from unrelated distances.
    spread = torch.arange(len(origin), device=origin.device) * 193 % FUTURE_TOKENS
    room = max(1, num_positions - end)
    if followed:
        distances = torch.exp(spread.double() / FUTURE_TOKENS * math.log(room)).long() - 1
    else:
        distances = spread * min(FUTURE_TOKENS, room) // FUTURE_TOKENS
    return (end + distances).clamp_max(num_positions - 1)


class PerLayer(Protocol):
    """What gives a tensor for the number of a layer: a tensor of all layers, or what puts one layer's together."""

    def __getitem__(self, layer: int, /) -> Tensor: ...


def build_in_slices(
    queries: PerLayer,  # (P, heads, D) of each layer: sampled queries, with their rotary embedding, in any dtype
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
    followed: bool = False,  # whether other segments come behind this one
    layers: range | None = None,  # build only the problems of these layers, one after the other; None means all
    count: int | None = None,  # build only about so many of the queries of each head; None means all
) -> Slices[Problems]:
    """Build the problems of a segment of a prompt, one per (layer, KV head), layers outermost; the work may pause after
    each layer. A prompt that is compressed as one span is its only segment.

    A problem has the queries of all heads of its KV head's group. Each sampled query asks from a position behind the n
    tokens (`future_positions`); the last `recent` ones ask from their own position, too. So a problem has (P + recent)
    · group query rows, or with a `count` those of them that `Problems.thin_rows` would choose. All positions are
    absolute.

    A caller that goes through the model in groups of `layers` bounds the memory that the problems take. The other
    arguments stay those of the whole model, and nothing of the other layers is read.
    """
    end = first + keys.shape[1]
    # Of the whole model, so that a group of layers has the same positions as all of them at once.
    covered = [rotary.num_positions for rotary in rotaries if rotary is not None]
    future = future_positions(positions, end, min(covered, default=end + FUTURE_TOKENS), followed)
    held_out = held_out_of(len(positions))
    # A query that is asked twice is held out twice or not at all.
    held_out = torch.cat([held_out, held_out[-recent:]])
    asked_at = torch.cat([future, positions[-recent:]])
    asked = (
        _ask(queries[layer].float(), recent, positions, future, rotaries[layer])  # (P + recent, heads, D)
        for layer in (range(len(rotaries)) if layers is None else layers)
    )
    if count is not None:
        kept = thin_positions(held_out, count)
        held_out, asked_at, asked = held_out[kept], asked_at[kept], (rows[kept] for rows in asked)
    problems = yield from asked_in_slices(
        asked,
        len(rotaries),
        asked_at,
        held_out,
        keys=keys,
        values=values,
        span=span,
        sinks=sinks,
        scale=scale,
        first=first,
        earlier=earlier,
        layers=layers,
    )
    return replace(problems, recent=recent if count is None else 0)


def held_out_of(count: int) -> Tensor:
    """Say of each of `count` sampled positions whether it is held out (count,) bool, on the host: judged on and never
    fitted to.
    """
    return torch.arange(count) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def asked_in_slices(
    asked: Iterable[Tensor],  # for each of `layers` (A, heads, D) fp32
    num_layers: int,  # L, of the whole model
    positions: Tensor,  # (A,) where they are asked
    held_out: Tensor,  # (A,) bool, on the host
    *,
    keys: Tensor,  # these as in `build_in_slices`
    values: Tensor,
    span: int,
    sinks: int,
    scale: float,
    first: int = 0,
    earlier: Earlier | None = None,
    layers: range | None = None,
) -> Slices[Problems]:
    """Build the problems, one per (layer, KV head), whose queries are given; the work may pause after each layer.

    `build_in_slices` gives a prompt's own queries, `evaluation.calibrate` those of a second reading.

    Raises:
        ValueError: `layers` is empty, has gaps or leaves the model; `earlier` is not of all the model's problems.
    """
    layers = range(num_layers) if layers is None else layers
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= num_layers:
        raise ValueError(f"{layers} is not a run of layers of a model that has {num_layers}")
    if earlier is not None and not len(earlier.keys) == len(earlier.values) == len(keys):
        raise ValueError(
            f"earlier entries of {len(earlier.keys)} and {len(earlier.values)} problems were given for {len(keys)}"
        )
    heads = len(keys) // num_layers
    recent_positions = torch.arange(first + span, first + keys.shape[1], device=keys.device)
    built: Problems | None = None
    for i, (layer, queries) in enumerate(zip(layers, asked, strict=True)):
        group = queries.shape[1] // heads
        if built is None:
            # Filled layer by layer: parts that are joined at the end would all be there twice.
            shape = (len(layers) * heads, len(positions) * group, queries.shape[2])
            which = slice(layers.start * heads, layers.stop * heads)
            built = Problems(
                queries=queries.new_empty(shape),
                keys=keys[which, sinks:span],
                values=values[which, sinks:span],
                retained_out=queries.new_empty(shape),
                retained_lse=queries.new_empty(shape[:2]),
                held_out=held_out.repeat_interleave(group),
                scale=scale,
                group=group,
            )
        own, target = slice(layer * heads, (layer + 1) * heads), slice(i * heads, (i + 1) * heads)
        rows = built.queries[target]  # (H, A·G, D)
        rows.view(heads, -1, group, shape[2]).copy_(queries.unflatten(1, (heads, group)).transpose(0, 1))
        # A layer at a time: for the whole model at once the scores of a wide window would take gigabytes.
        built.retained_out[target], built.retained_lse[target] = retained_attention(
            rows,
            positions.repeat_interleave(group),
            keys[own, :sinks],
            values[own, :sinks],
            keys[own, span:],
            values[own, span:],
            recent_positions,
            scale,
            None if earlier is None else earlier.part(own),
        )
        yield
    assert built is not None  # `layers` is not empty
    return built


asked_problems = at_once(asked_in_slices)
build_problems = at_once(build_in_slices)


def _ask(real: Tensor, recent: int, origin: Tensor, future: Tensor, rotary: Rotary | None) -> Tensor:
    """One layer's queries (P, heads, D): all of them at `future`, then the recent ones as they were.

    Without a rotary embedding a query is the same wherever it is asked, and only sees more of the recent window.
    """
    moved = real if rotary is None else rotary.move(real, origin, future)
    return torch.cat([moved, real[-recent:]])
