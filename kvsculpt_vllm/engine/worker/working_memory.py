"""How much memory compression takes beside the model and its cache: what a GPU worker keeps free."""

from __future__ import annotations

from typing import NamedTuple

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared import sample_room
from kvsculpt_vllm.engine.shared.rank_shape import RankShape
from kvsculpt_vllm.sculpt.effort import EFFORTS
from kvsculpt_vllm.sculpt.memory import layer_groups
from kvsculpt_vllm.sculpt.queries import RECENT_POSITIONS

BUILD_COPIES = 4
"""Tensors as large as a group's queries in float32 that live while they are built: the queries themselves, and what
retained entries answer; and these again for what a second reading would ask."""

LAYER_COPIES = 5
"""Tensors as large as a layer's queries in float32 that live besides while that layer's are built."""

TEMPORARIES = 2.5
"""Temporaries of the largest size that live at once."""

FIT_COPIES = 7
"""Tensors as large as a batch's queries in float32 that live while it is fitted."""

STEP_COPIES = 30
"""Tensors as large as the keys of a batch that key steps hold: ten pairs of curvature, and what one step makes."""


ROOM = 3 << 30
"""Bytes that may be kept free for a faster solve, samples included."""


class Sizes(NamedTuple):
    """What a solve works with, see `sculpt.memory`; bytes."""

    temporary: int
    group: int


LADDER = (
    Sizes(512 << 20, 1536 << 20),
    Sizes(384 << 20, 1024 << 20),
    Sizes(256 << 20, 1024 << 20),
    Sizes(256 << 20, 512 << 20),
    Sizes(128 << 20, 512 << 20),
)
"""Larger batches are faster: fewer launches, and more systems factored at once (measured on an H100:
benchmarks/LOG.md)."""


class Reserved(NamedTuple):
    """Bytes that a GPU worker keeps free, and what a solve works with then."""

    samples: int  # for the queries of all prompts
    solve: int  # for the solve of the longest segment
    sizes: Sizes

    @property
    def total(self) -> int:
        """All bytes."""
        return self.samples + self.solve


def reserved(rank: RankShape, config: CompressionConfig, max_model_len: int, room: int = ROOM) -> Reserved:
    """Say what to keep free on a GPU: the samples of all prompts at most, and the solve of the longest segment by any
    effort that a request may ask for (`--kv-compression-max-effort`), in a context of `max_model_len` tokens. The
    solve works with the largest sizes with which that is no more than `room`, or with the smallest ones there are.
    """
    samples = rank.position_bytes * sample_room.positions_on_gpu(config)
    every = (Reserved(samples, _solve(rank, config, max_model_len, sizes), sizes) for sizes in LADDER)
    found = next(every)
    for smaller in every:
        if found.total <= room:
            break
        found = smaller
    return found


def _solve(rank: RankShape, config: CompressionConfig, max_model_len: int, sizes: Sizes) -> int:
    """Bytes of the solve of the longest segment that works with these sizes."""
    efforts = [EFFORTS[name] for name in config.efforts]
    tokens = min(sample_room.longest_segment(config), max_model_len)
    sampled = min(tokens, max(effort.positions_for(rank.position_bytes) for effort in efforts))
    return solve_bytes(
        num_layers=rank.num_layers,
        num_kv_heads=rank.num_kv_heads,
        num_query_heads=rank.num_query_heads,
        head_size=rank.head_size,
        asked=sampled + RECENT_POSITIONS,
        fitted_on=min((effort.fit_positions for effort in efforts if effort.key_steps), default=sampled),
        segment_tokens=tokens,
        context_tokens=max_model_len,
        cache_bytes=rank.entry_bytes,
        largest_temporary=sizes.temporary,
        group_bytes=sizes.group,
        decoded=rank.in_fp8,
    )


def solve_bytes(
    *,
    num_layers: int,
    num_kv_heads: int,
    num_query_heads: int,
    head_size: int,
    asked: int,  # queries of a query head: sampled positions, the recent ones twice
    fitted_on: int,  # of those, the fewest that key steps are fitted to
    segment_tokens: int,  # with its window
    context_tokens: int,  # of all segments before it, too
    cache_bytes: int,  # of one element of the cache
    largest_temporary: int,  # bytes
    group_bytes: int,  # that a group of layers may take
    decoded: bool = False,  # whether entries are read from FP8, which is there as well meanwhile
) -> int:
    """Estimate from above the bytes that the solve of one segment takes (`sculpt.layerwise`), its sample aside. A test
    holds it to what a solve takes on the CPU.
    """
    layer = asked * num_query_heads * head_size * 4
    group = max(map(len, layer_groups(num_layers, layer, group_bytes)))
    pair = 2 * head_size * cache_bytes  # of one entry
    rows = num_query_heads // num_kv_heads
    # A batch may be one problem of any size.
    largest_temporary = max(largest_temporary, asked * rows * segment_tokens * 4)
    # Of one head at a time, which may have kept everything: its keys are there while both are read once more.
    building = (BUILD_COPIES * group + LAYER_COPIES) * layer + 2 * context_tokens * pair
    entries = min(largest_temporary // (4 * min(fitted_on, asked) * rows), group * num_kv_heads * segment_tokens)
    fitting = FIT_COPIES * group * layer + STEP_COPIES * entries * head_size * 4
    made = group * num_kv_heads * segment_tokens * pair
    whole = num_layers * num_kv_heads * segment_tokens * pair
    reading = whole // 4 if decoded else 0
    return whole + max(reading, made + max(building, fitting)) + int(TEMPORARIES * largest_temporary)
