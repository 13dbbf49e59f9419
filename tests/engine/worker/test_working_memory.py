"""The memory that is kept free for a solve is not less than one takes."""

import weakref
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared import sample_room
from kvsculpt_vllm.engine.worker.working_memory import solve_bytes
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.effort import EFFORTS, Effort
from kvsculpt_vllm.sculpt.layerwise import compress_segment
from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.memory import BYTES, COPIES, GROUP_BYTES
from kvsculpt_vllm.sculpt.problem import Earlier
from kvsculpt_vllm.sculpt.queries import RECENT_POSITIONS, sample_positions
from kvsculpt_vllm.sculpt.segment_source import SegmentSource


class LiveBytes(TorchDispatchMode):
    """Follows the storages of everything that torch returns; `peak` is the most that lived at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._live = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._live:
                    self._live[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata)
        return result

    def _gone(self, address):
        self.now -= self._live.pop(address, 0)


@dataclass(frozen=True)
class Shape:
    """A model's attention, and the segment of it that is solved."""

    layers: int
    kv_heads: int
    heads: int
    head_size: int
    segment_tokens: int
    context_tokens: int


@pytest.mark.parametrize("keep", [0.1, 0.5])
@pytest.mark.parametrize("temporary", [1 << 19, 1 << 21])
@pytest.mark.parametrize("effort", [Effort(300, 32, 192, key_steps=6), Effort(300, 32, 300, key_steps=6)])
@pytest.mark.parametrize("method", ["select", "sculpt"])
@pytest.mark.parametrize("layers_at_once", [1, 2, 4])
def test_a_solve_takes_no_more_than_is_kept_free(method, effort, temporary, keep, layers_at_once, monkeypatch):
    monkeypatch.setitem(BYTES, "cpu", temporary)
    shape = Shape(layers=4, kv_heads=2, heads=4, head_size=32, segment_tokens=300, context_tokens=2300)
    asked = shape.segment_tokens + RECENT_POSITIONS
    group_bytes = layers_at_once * COPIES * asked * shape.heads * shape.head_size * 4
    estimate = solve_bytes(
        num_layers=shape.layers,
        num_kv_heads=shape.kv_heads,
        num_query_heads=shape.heads,
        head_size=shape.head_size,
        asked=asked,
        fitted_on=effort.fit_positions,
        segment_tokens=shape.segment_tokens,
        context_tokens=shape.context_tokens,
        cache_bytes=2,
        largest_temporary=temporary,
        group_bytes=group_bytes,
    )
    peak = peak_of_solve(shape, method, effort, keep, group_bytes)
    assert peak < estimate


def peak_of_solve(shape, method, effort, keep, group_bytes):
    """The most bytes that a solve holds, its sample and what it writes aside."""
    first = shape.context_tokens - shape.segment_tokens
    positions, recent = sample_positions(first, shape.context_tokens, shape.segment_tokens)
    queries = torch.randn(shape.layers, len(positions), shape.heads, shape.head_size).bfloat16()
    problems, span_blocks = shape.layers * shape.kv_heads, (shape.segment_tokens - 64) // 16
    pairs = torch.randn(2, problems, shape.segment_tokens, shape.head_size).bfloat16()
    earlier = torch.randn(2, problems, first // 2, shape.head_size).bfloat16()
    plan = PagePlan(16, span_blocks, int(problems * span_blocks * keep), 4)
    with fast_matmul():
        pass  # the first time in a process it multiplies matrices to see how exact they become
    with LiveBytes() as live, torch.no_grad():
        keys, values = pairs.clone()  # read from pages
        source = SegmentSource(
            queries,
            positions,
            recent,
            keys,
            values,
            span_blocks * 16,
            4,
            [None] * shape.layers,
            shape.head_size**-0.5,
            first,
            Earlier(OnDemand(earlier[0]), OnDemand(earlier[1])),
        )
        compress_segment(source, plan, method, "adaptive", effort, lambda *_: None, group_bytes=group_bytes)
    return live.peak


class OnDemand:
    """The entries of earlier segments as an engine reads them: a copy of a head's when they are asked for."""

    def __init__(self, entries):
        self.entries = entries

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, which):
        return OnDemand(self.entries[which]) if isinstance(which, slice) else self.entries[which].clone()


def test_three_gigabytes_are_enough_for_a_model_of_eight_billion_parameters():
    layers, kv_heads, heads, head_size, longest_context = 32, 8, 32, 128, 131_072  # Llama-3.1-8B, bfloat16
    tokens = sample_room.longest_segment(CompressionConfig())
    samples = sample_room.SEGMENTS * tokens * layers * heads * head_size * 2
    solve = solve_bytes(
        num_layers=layers,
        num_kv_heads=kv_heads,
        num_query_heads=heads,
        head_size=head_size,
        asked=tokens + RECENT_POSITIONS,
        fitted_on=min(effort.fit_positions for effort in EFFORTS.values() if effort.key_steps),
        segment_tokens=tokens,
        context_tokens=longest_context,
        cache_bytes=2,
        largest_temporary=BYTES["cuda"],
        group_bytes=GROUP_BYTES["cuda"],
    )
    print(f"samples {samples / 2**30:.2f} GiB, solve {solve / 2**30:.2f} GiB")
    assert samples + solve <= 3 * 2**30
