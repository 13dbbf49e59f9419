"""Every function of vLLM that we replace or override, and when that can end. A test holds each to every vLLM that it is
for; one that goes with an old vLLM has that in its name.
"""

from __future__ import annotations

from kvsculpt_vllm.engine.compat.patcher import Patch

ADD_CLI_ARGS = Patch(
    "vllm.engine.arg_utils:EngineArgs.add_cli_args",
    ("parser",),
    "vLLM lets a plugin add a group of flags",
)
CREATE_ENGINE_CONFIG = Patch(
    "vllm.engine.arg_utils:EngineArgs.create_engine_config",
    ("self", "usage_context", "headless"),
    "vLLM lets a plugin change and refuse an engine's configuration",
)

MAX_MEMORY_USAGE = Patch(
    "vllm.v1.core.kv_cache_planning:_max_memory_usage_bytes_from_groups",
    ("builder", "vllm_config", "kv_cache_groups"),
    "vLLM asks the scheduler's class how much memory the longest request takes",
    versions=">=0.33",
)
MAX_MEMORY_USAGE_0_32 = Patch(
    "vllm.v1.core.kv_cache_utils:_max_memory_usage_bytes_from_groups",
    ("vllm_config", "kv_cache_groups"),
    MAX_MEMORY_USAGE.can_go_when,
    versions="<0.33",
)

_CHECKS = "vLLM lets a plugin check a request's extra arguments before it answers"
PROCESS_INPUTS = Patch(
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    (
        *("self", "request_id", "prompt", "params", "supported_tasks", "arrival_time", "lora_request"),
        *("tokenization_kwargs", "trace_headers", "priority", "data_parallel_rank", "resumable", "session_id"),
        "kv_hints",
    ),
    _CHECKS,
)
GENERATE = Patch(
    "vllm.v1.engine.async_llm:AsyncLLM.generate",
    (
        *("self", "prompt", "sampling_params", "request_id", "prompt_text", "lora_request", "tokenization_kwargs"),
        *("trace_headers", "priority", "data_parallel_rank", "session_id", "kv_hints", "reasoning_ended"),
        "reasoning_parser_kwargs",
    ),
    _CHECKS,
)
CREATE_CHAT_COMPLETION = Patch(
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.create_chat_completion",
    ("self", "request", "raw_request"),
    _CHECKS,
)
CREATE_COMPLETION = Patch(
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.create_completion",
    ("self", "request", "raw_request"),
    _CHECKS,
)
CREATE_RESPONSES = Patch(
    "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses.create_responses",
    ("self", "request", "raw_request"),
    _CHECKS,
)
CREATE_BATCH_CHAT_COMPLETION = Patch(
    "vllm.entrypoints.openai.chat_completion.batch_serving:OpenAIServingChatBatch.create_batch_chat_completion",
    ("self", "request", "raw_request"),
    _CHECKS,
)
CREATE_TRANSCRIPTION = Patch(
    "vllm.entrypoints.speech_to_text.transcription.serving:OpenAIServingTranscription.create_transcription",
    ("self", "audio_data", "request", "raw_request"),
    _CHECKS,
)
CREATE_TRANSLATION = Patch(
    "vllm.entrypoints.speech_to_text.translation.serving:OpenAIServingTranslation.create_translation",
    ("self", "audio_data", "request", "raw_request"),
    _CHECKS,
)
RENDER = Patch("vllm.entrypoints.scale_out.render.api_router:render", ("request",), _CHECKS)
RUN_BATCH_REQUEST = Patch(
    "vllm.entrypoints.launchers.run_batch:run_one_request",
    ("request_json", "endpoint_registry"),
    "vLLM's type of `vllm_xargs` leaves booleans as they are",
    versions=">=0.33",
)
READ_BATCH_FILE_0_32 = Patch(
    "vllm.entrypoints.launchers.run_batch:read_file",
    ("path_or_url",),
    RUN_BATCH_REQUEST.can_go_when,
    versions="<0.33",
)
LOAD_ENDPOINT_PLUGINS = Patch(
    "vllm.plugins:load_endpoint_plugins",
    ("supported_tasks",),
    "vLLM loads the endpoint plugins of a feature that is switched on without VLLM_PLUGINS naming them",
)

ALLOCATE_SLOTS = Patch(
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
    (
        *("self", "request", "num_new_tokens", "num_new_computed_tokens", "new_computed_blocks"),
        *("num_lookahead_tokens", "num_external_computed_tokens", "delay_cache_blocks", "num_encoder_tokens"),
        *("full_sequence_must_fit", "reserved_blocks", "has_scheduled_reqs", "skip_zeroing_group_ids"),
    ),
    "vLLM's scheduler has a public hook for admission",
)
LOCAL_PREFIX_CACHE_HIT = Patch(
    "vllm.v1.core.sched.scheduler:Scheduler._get_local_prefix_cache_hit",
    ("self", "request", "max_cache_hit_length"),
    "vLLM's scheduler has a public hook for prefix-cache hits",
    versions=">=0.33",
)
LOCAL_PREFIX_CACHE_HIT_0_32 = Patch(
    LOCAL_PREFIX_CACHE_HIT.target,
    ("self", "request"),
    LOCAL_PREFIX_CACHE_HIT.can_go_when,
    versions="<0.33",
)
ADD_REQUEST = Patch(
    "vllm.v1.core.sched.scheduler:Scheduler.add_request",
    ("self", "request"),
    "vLLM's scheduler has a public hook for admission",
)
HANDLE_BLOCKED_WAITING_REQUEST = Patch(
    "vllm.v1.core.sched.scheduler:Scheduler._handle_blocked_waiting_request",
    ("self", "request"),
    "vLLM's scheduler has a public hook for a request that is not begun yet",
)
RESERVE_PREFILL_LOOKAHEAD = Patch(
    "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead",
    ("self", "request", "num_computed_tokens", "num_new_tokens"),
    "vLLM's scheduler has a public hook for the size of a chunk",
)
PREEMPT_REQUEST = Patch(
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request",
    ("self", "request", "timestamp", "drop_stale_output"),
    "vLLM's scheduler has a public hook for a request that loses its blocks",
)
FREE_REQUEST = Patch(
    "vllm.v1.core.sched.scheduler:Scheduler._free_request",
    ("self", "request", "delay_free_blocks"),
    PREEMPT_REQUEST.can_go_when,
)

UPDATE_STATES = Patch(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states",
    ("self", "scheduler_output"),
    "a scheduler output can say that a running request's block list was replaced",
)
_SEEDS = "vLLM's CPU runner rewinds the generator of a seeded request whose draw it discards, as its GPU runner does"
SAMPLE = Patch(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
    ("self", "logits", "spec_decode_metadata"),
    _SEEDS,
)
BOOKKEEPING_SYNC = Patch(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync",
    ("self", "scheduler_output", "sampler_output", "logits", "hidden_states", "num_scheduled_tokens"),
    _SEEDS,
)
SET_ISA_TO_LAYERS = Patch(
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder._set_isa_to_layers",
    ("self", "layer_names"),
    "pages are read and written in the order of the AMX kernel, too",
)

PATCHES = tuple(value for value in dict(globals()).values() if isinstance(value, Patch))
