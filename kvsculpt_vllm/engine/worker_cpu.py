"""vLLM's CPU worker with compression."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from kvsculpt_vllm.engine.worker import SculptWorkerMixin


class SculptCPUWorker(SculptWorkerMixin, CPUWorker):
    """Reads packed prefixes with the stock CPU kernels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Here and not at import, so that the backend is replaced only where compression is on.
        register_backend(AttentionBackendEnum.CPU_ATTN, "kvsculpt_vllm.engine.attention_cpu.SculptCPUBackend")
        super().__init__(*args, **kwargs)
