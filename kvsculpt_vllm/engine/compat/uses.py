"""What we use of vLLM that neither imports nor mypy would miss in another version: private names, and names of objects
whose type is not known here. A test holds each to every vLLM that it is for, as it does with `patches`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsculpt_vllm.engine.compat.patcher import has


@dataclass(frozen=True)
class Use:
    """A function, an attribute of a class's objects, or another name in vLLM."""

    target: str
    """Where it is, as `module:name` or `module:Class.name`."""
    parameters: tuple[str, ...] | None = None
    """The names of its parameters, in order; None where it is not called."""
    versions: str = ""
    """As of a patch."""

    def is_for(self, version: str) -> bool:
        """Whether that vLLM has it."""
        return has(self.versions, version)


_POOL = "vllm.v1.core.block_pool:BlockPool"
_RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_BATCH = "vllm.v1.worker.gpu_input_batch:InputBatch"
_LAYER = "vllm.model_executor.layers.attention:Attention"

USES = (
    # The scheduler and its blocks.
    Use(f"{_POOL}._insert_block_hash", ("self", "block_hash_with_group_id", "block", "num_tokens")),
    Use(f"{_POOL}._reuse_watchers"),
    Use(f"{_POOL}.evict_blocks", ("self", "block_ids")),
    Use("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.single_type_managers"),
    Use("vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.req_to_blocks"),
    Use("vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.num_cached_block"),
    *(
        Use(f"vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.{name}")
        for name in ("kv_cache_spec", "max_admission_blocks_per_request")
    ),
    Use("vllm.v1.core.kv_cache_manager:KVCacheManager.kv_cache_config"),
    Use("vllm.v1.core.sched.scheduler:Scheduler.grammar_compile_error_reqs"),
    Use("vllm.v1.engine.core:EngineCore.scheduler"),
    # The front end.
    Use("vllm.engine.arg_utils:EngineArgs._api_process_count"),
    Use("vllm.engine.arg_utils:EngineArgs._api_process_rank"),
    Use("vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", ("self", "method", "args")),
    Use(
        "vllm.entrypoints.serve.tokenize.serving:ServingTokenization.create_tokenize",
        ("self", "request", "raw_request"),
    ),
    Use("vllm.entrypoints.openai.models.serving:OpenAIServingModels.lora_requests"),
    # The model runners, V1 and V2.
    *(Use(f"{_RUNNER_V1}.{name}") for name in ("requests", "input_batch", "discard_request_mask")),
    *(Use(f"{_BATCH}.{name}") for name in ("req_id_to_index", "req_ids", "num_reqs", "generators", "block_table")),
    Use("vllm.v1.worker.block_table:BlockTable.add_row", ("self", "block_ids", "row_idx")),
    Use("vllm.v1.worker.block_table:BlockTable.get_device_tensor", ("self", "num_reqs")),
    Use("vllm.v1.worker.gpu.block_table:BlockTables.input_block_tables"),
    *(Use(f"{_RUNNER_V2}.{name}") for name in ("req_states", "block_tables")),
    *(Use(f"vllm.v1.worker.gpu.states:RequestState.{name}") for name in ("req_id_to_index", "index_to_req_id")),
    *(Use(f"vllm.v1.worker.gpu.block_table:BlockTables.{name}") for name in ("block_tables", "num_blocks")),
    Use("vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor.stage_write", ("self", "index", "start", "x")),
    *(
        Use(f"{runner}.{name}")
        for runner in (_RUNNER_V1, _RUNNER_V2)
        for name in ("vllm_config", "device", "get_model")
    ),
    Use(
        "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.maybe_dummy_run_with_lora",
        (
            *("self", "lora_config", "num_scheduled_tokens", "num_sampled_tokens", "remove_lora", "num_active_loras"),
            "mapping_type",
        ),
    ),
    # Attention.
    Use("vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.isa"),
    Use("vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.sinks"),
    Use("vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.logits_soft_cap"),
    Use(f"{_LAYER}.kv_cache_update_bypass", versions=">=0.33"),
)
