"""The memory that is kept free for a solve is not less than one takes."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvsculpt_vllm.engine.worker.working_memory import solve_bytes
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import compress
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.queries import build_problems, sample_positions


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


@pytest.mark.parametrize("limit", [1 << 18, 1 << 20])
@pytest.mark.parametrize("method", ["select", "sculpt"])
def test_a_solve_takes_no_more_than_is_kept_free(method, limit):
    layers, heads, group, head_size, tokens, count = 4, 2, 2, 32, 300, 256
    positions, recent = sample_positions(0, tokens, count)
    queries = torch.randn(layers, len(positions), heads * group, head_size).bfloat16()
    keys, values = torch.randn(2, layers * heads, tokens, head_size).bfloat16()
    plan = PagePlan(16, 14, int(layers * heads * 14 * 0.3), 4)
    effort = Effort(count, pilot_positions=32, fit_positions=192, key_steps=2)
    with fast_matmul():
        pass  # the first time in a process it multiplies matrices to see how exact they become
    with LiveBytes() as live, torch.no_grad():
        problems = build_problems(queries, positions, recent, keys, values, 224, 4, [None] * layers, head_size**-0.5)
        compress(problems, plan, method, "adaptive", effort, limit)
    assert live.peak < solve_bytes(layers * heads, (count + recent) * group, head_size, tokens, 2, limit * 4)
