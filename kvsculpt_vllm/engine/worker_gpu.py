"""vLLM's GPU worker with compression."""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from kvsculpt_vllm.engine.pages import TokenPages
from kvsculpt_vllm.engine.worker import SculptWorkerMixin


class SculptGPUWorker(SculptWorkerMixin, Worker):
    """Reads packed prefixes with our kernel."""

    attention_backend = (AttentionBackendEnum.CUSTOM, "kvsculpt_vllm.engine.attention_triton.SculptTritonBackend")
    page_format = TokenPages
