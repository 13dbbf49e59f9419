"""Let a server start on a CPU where vLLM's default share of the memory is more than there is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.config import CacheConfig
from vllm.logger import init_logger
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.kvsculpt")

OTHER_PROCESSES = 3 << 30
"""Bytes left to the server's own processes, which start after the memory was looked at."""


def fit_default_memory(args: EngineArgs) -> None:
    """Lower `--gpu-memory-utilization` to what fits, if it is vLLM's default and does not fit.

    On a CPU vLLM asks for 92 % of one node's memory and stops where less is free, as it nearly always is on a small
    machine. A value of the user's own, in whichever way it was given, is left alone.
    """
    given = args.gpu_memory_utilization != CacheConfig.gpu_memory_utilization
    if given or args.kv_cache_memory_bytes is not None or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return
    node = get_memory_node_info(get_allowed_cpu_list()[0].numa_node)
    fits = (node.available_memory - OTHER_PROCESSES) / node.total_memory
    if fits < args.gpu_memory_utilization:
        args.gpu_memory_utilization = max(0.1, int(fits * 20) / 20)
        logger.info(
            "kvsculpt: --gpu-memory-utilization set to %g, because vLLM's default of %g does not fit in the memory "
            "that is free now",
            args.gpu_memory_utilization,
            CacheConfig.gpu_memory_utilization,
        )
