"""vLLM's GPU worker with compression."""

from __future__ import annotations

import torch
from vllm.logger import init_logger
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared import sample_room
from kvsculpt_vllm.engine.worker.pages import TokenPages
from kvsculpt_vllm.engine.worker.worker import SculptWorkerMixin
from kvsculpt_vllm.engine.worker.working_memory import solve_bytes
from kvsculpt_vllm.sculpt.effort import EFFORTS
from kvsculpt_vllm.sculpt.memory import BYTES, GROUP_BYTES
from kvsculpt_vllm.sculpt.queries import RECENT_POSITIONS

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

        A size that the user gave (`--kv-cache-memory-bytes`) is theirs.
        """
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available
        reserved = self._reserved_bytes()
        if reserved >= available:
            raise ValueError(
                f"--kv-compression: compressing takes {reserved / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are "
                "there for it and the KV cache: lower --kv-compression-segment or --max-model-len, or say by "
                "--kv-cache-memory-bytes how much the KV cache gets"
            )
        logger.info("kvsculpt: %.2f GiB of the KV cache's memory kept free for compression", reserved / 2**30)
        return available - reserved

    def _reserved_bytes(self) -> int:
        """Bytes that the samples of all prompts take at most, and the solve of the longest segment."""
        model, parallel = self.model_config, self.parallel_config
        assert isinstance(model.dtype, torch.dtype)  # and no name any more: vLLM has resolved it
        element_bytes, head_size = get_dtype_size(model.dtype), model.get_head_size()
        num_layers, num_heads = model.get_num_layers(parallel), model.get_num_attention_heads(parallel)
        position_bytes = sample_room.position_bytes(self.vllm_config)
        config = CompressionConfig.from_additional_config(self.vllm_config.additional_config)
        # Whatever the server's effort is, a request may ask for another.
        efforts = [EFFORTS[name] for name in config.efforts]
        tokens = min(sample_room.longest_segment(config), model.max_model_len)
        sampled = min(tokens, max(effort.positions_for(position_bytes) for effort in efforts))
        return position_bytes * sample_room.positions(self.vllm_config, config) + solve_bytes(
            num_layers=num_layers,
            num_kv_heads=model.get_num_kv_heads(parallel),
            num_query_heads=num_heads,
            head_size=head_size,
            asked=sampled + RECENT_POSITIONS,
            fitted_on=min((effort.fit_positions for effort in efforts if effort.key_steps), default=sampled),
            segment_tokens=tokens,
            context_tokens=model.max_model_len,
            cache_bytes=element_bytes,
            largest_temporary=BYTES["cuda"],
            group_bytes=GROUP_BYTES["cuda"],
        )
