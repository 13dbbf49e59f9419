"""What does not go together with the sliding windows of a model that mixes them with full attention."""

from __future__ import annotations

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.groups import has_windows
from kvsculpt_vllm.engine.shared.stores import NO_STORE
from kvsculpt_vllm.engine.startup.refusals.refusal import Refusal, Rule

WINDOWS = (
    Rule(
        lambda c: has_windows(c) and c.parallel_config.pipeline_parallel_size > 1,
        Refusal(
            "pipeline parallelism of a model with sliding windows",
            "ranks have different numbers of layers that are compressed",
            "use --tensor-parallel-size in the place of --pipeline-parallel-size",
        ),
    ),
    Rule(
        lambda c: has_windows(c) and c.scheduler_config.disable_hybrid_kv_cache_manager,
        Refusal(
            "one KV cache group for windows and full attention",
            "compression would have to leave some layers of a block alone",
            "remove --disable-hybrid-kv-cache-manager",
        ),
    ),
    Rule(
        lambda c: has_windows(c) and CompressionConfig.from_additional_config(c.additional_config).store != NO_STORE,
        Refusal(
            "the store of a model with sliding windows",
            "a segment in it has no windows to go on from",
            "remove --kv-compression-store",
        ),
    ),
)
