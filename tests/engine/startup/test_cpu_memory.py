"""The default share of memory is lowered only where it is the default and does not fit."""

from types import SimpleNamespace

import pytest
from vllm.config import CacheConfig

from kvsculpt_vllm.engine.startup import cpu_memory

GIB = 1 << 30
DEFAULT = CacheConfig.gpu_memory_utilization


@pytest.mark.parametrize(
    ("free", "asked", "bytes_given", "expected"),
    [
        (15, DEFAULT, None, 0.75),  # (15 - 3) / 16
        (1, DEFAULT, None, 0.1),
        (64, DEFAULT, None, DEFAULT),
        (15, 0.9, None, 0.9),
        (15, DEFAULT, GIB, DEFAULT),
    ],
)
def test_only_a_default_that_does_not_fit_is_lowered(monkeypatch, free, asked, bytes_given, expected):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    node = SimpleNamespace(available_memory=free * GIB, total_memory=16 * GIB)
    monkeypatch.setattr(cpu_memory, "get_memory_node_info", lambda node_id: node)
    args = SimpleNamespace(gpu_memory_utilization=asked, kv_cache_memory_bytes=bytes_given)
    cpu_memory.fit_default_memory(args)
    assert args.gpu_memory_utilization == pytest.approx(expected)
