"""vLLM's GPU worker with compression."""

from __future__ import annotations

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from kvsculpt_vllm.engine.shared.capacity import server_settings
from kvsculpt_vllm.engine.shared.rank_shape import RankShape
from kvsculpt_vllm.engine.worker.pages import TokenPages
from kvsculpt_vllm.engine.worker.worker import SculptWorkerMixin
from kvsculpt_vllm.engine.worker.working_memory import ROOM, Reserved, reserved
from kvsculpt_vllm.sculpt.memory import work_with

logger = init_logger("vllm.kvsculpt")


class SculptGPUWorker(SculptWorkerMixin, Worker):
    """Reads packed prefixes with our kernel."""

    attention_backend = (
        AttentionBackendEnum.CUSTOM,
        "kvsculpt_vllm.engine.worker.attention_triton.SculptTritonBackend",
    )
    page_format = TokenPages

    def wait_for_device(self) -> None:
        """Wait until the GPU is done with what a slice has launched. Only so can the time that a slice takes be
        measured.
        """
        torch.cuda.current_stream().synchronize()

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache: what vLLM finds, less what the solve of the longest segment and all samples take.

        A size that the user gave (`--kv-cache-memory-bytes`) is theirs. One that vLLM has noted at an earlier start
        (`VLLM_ENABLE_STARTUP_PLAN`) is not: it is what there was before we kept anything free.
        """
        given = self.cache_config.kv_cache_memory_bytes  # by the user: vLLM sets it too, from its plan
        available = super().determine_available_memory()
        kept = self._reserved(ROOM if not given else min(ROOM, self._free_bytes() - given))
        work_with("cuda", *kept.sizes)
        if given:
            return available
        kept_free = kept.total
        if kept_free >= available:
            raise ValueError(
                f"--kv-compression: compressing takes {kept_free / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are "
                "there for it and the KV cache: lower --kv-compression-segment or --max-model-len, or say by "
                "--kv-cache-memory-bytes how much the KV cache gets"
            )
        logger.info("kvsculpt: %.2f GiB of the KV cache's memory kept free for compression", kept_free / 2**30)
        return available - kept_free

    def _reserved(self, room: int) -> Reserved:
        """What the samples of all prompts take at most, and the solve of the longest segment."""
        config = server_settings(self.vllm_config)
        return reserved(RankShape.of(self.vllm_config), config, self.model_config.max_model_len, room)

    def _free_bytes(self) -> int:
        """Of the device's memory, the model's weights being there and the KV cache not yet."""
        return torch.cuda.mem_get_info()[0]
