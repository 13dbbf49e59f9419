"""vLLM's CPU worker with compression."""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker

from kvsculpt_vllm.engine.worker.pages import VectorPages
from kvsculpt_vllm.engine.worker.worker import SculptWorkerMixin


class SculptCPUWorker(SculptWorkerMixin, CPUWorker):
    """Reads packed prefixes with the stock CPU kernels."""

    # vLLM's CPU platform takes no other name.
    attention_backend = (AttentionBackendEnum.CPU_ATTN, "kvsculpt_vllm.engine.worker.attention_cpu.SculptCPUBackend")
    page_format = VectorPages
