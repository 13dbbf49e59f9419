"""vLLM's CPU worker with compression."""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from kvsculpt_vllm.engine.compat.worker import rewind_discarded_draws
from kvsculpt_vllm.engine.worker.pages import VectorPages
from kvsculpt_vllm.engine.worker.worker import SculptWorkerMixin


class SculptCPUWorker(SculptWorkerMixin, CPUWorker):
    """Reads packed prefixes with the stock CPU kernels."""

    # vLLM's CPU platform takes no other name.
    attention_backend = (AttentionBackendEnum.CPU_ATTN, "kvsculpt_vllm.engine.worker.attention_cpu.SculptCPUBackend")
    page_format = VectorPages

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Bind compression, and make what it asks of vLLM safe: prompts are computed in more chunks than without it."""
        super().initialize_from_config(kv_cache_config)
        if not self.use_v2_model_runner:
            rewind_discarded_draws(self.model_runner)
