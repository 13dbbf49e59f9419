"""Where the plugin enters vLLM: its flags, and the making of the engine's configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform

from kvsculpt_vllm.calibration_file import NONE
from kvsculpt_vllm.config import KEY, CompressionConfig, flag
from kvsculpt_vllm.engine.compat.frontend import is_extra_api_server
from kvsculpt_vllm.engine.compat.patcher import apply
from kvsculpt_vllm.engine.compat.patches import (
    ADD_CLI_ARGS,
    CREATE_ENGINE_CONFIG,
    MAX_MEMORY_USAGE,
    MAX_MEMORY_USAGE_0_32,
)
from kvsculpt_vllm.engine.shared.capacity import blocks_of_longest, outgrows_memory, server_settings
from kvsculpt_vllm.engine.shared.groups import has_windows
from kvsculpt_vllm.engine.startup.calibration_setting import resolved
from kvsculpt_vllm.engine.startup.cpu_memory import fit_default_memory
from kvsculpt_vllm.engine.startup.flags import add_flags
from kvsculpt_vllm.engine.startup.refusals.cache import DEFAULT_LAYOUT, KERNEL_BLOCK_SIZE, requested_layout
from kvsculpt_vllm.engine.startup.refusals.configuration import check_attention_backend, check_config
from kvsculpt_vllm.engine.startup.refusals.device import check_platform
from kvsculpt_vllm.engine.startup.request_checks import install_request_checks
from kvsculpt_vllm.engine.startup.store_setting import check_store
from kvsculpt_vllm.layer_kinds import FULL
from kvsculpt_vllm.sculpt.chain import SEGMENT
from kvsculpt_vllm.store.places import shown

# vLLM sets up handlers for its own loggers only.
logger = init_logger("vllm.kvsculpt")

WORKERS = {
    "cpu": "kvsculpt_vllm.engine.worker.worker_cpu.SculptCPUWorker",
    "cuda": "kvsculpt_vllm.engine.worker.worker_gpu.SculptGPUWorker",
}
TRITON_BACKEND = "kvsculpt_vllm.engine.worker.attention_triton.SculptTritonBackend"
SCHEDULER = "kvsculpt_vllm.engine.scheduler.scheduler.SculptScheduler"
TRUST = "self-tested on this device at start-up; benchmarks on GPUs: of one H100"
ASYNC_SCHEDULER = "kvsculpt_vllm.engine.scheduler.scheduler.SculptAsyncScheduler"

_compresses = False


def compresses_here() -> bool:
    """Whether this process has made an engine's configuration with compression."""
    return _compresses


def install() -> None:
    """Wrap `EngineArgs.add_cli_args`, `EngineArgs.create_engine_config`, and the check of memory that an engine core
    makes before it has any class of ours; once per process.
    """
    apply(ADD_CLI_ARGS, _with_flags)
    apply(CREATE_ENGINE_CONFIG, _with_compression)
    for patch in (MAX_MEMORY_USAGE, MAX_MEMORY_USAGE_0_32):
        apply(patch, _as_compressed)


def _with_flags(stock: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = stock(parser)
        add_flags(parser)
        return parser

    return add_cli_args


def _with_compression(stock: Callable[..., VllmConfig]) -> Callable[..., VllmConfig]:
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        install_request_checks()
        config = CompressionConfig.from_additional_config(self.additional_config)
        quiet = is_extra_api_server(self)
        if not config.active:
            if KEY in (self.additional_config or {}) and not quiet:
                logger.info("KV compression: inactive, because --kv-compression is none.")
            return stock(self, *args, **kwargs)
        check_platform(current_platform)
        chosen = self.block_size is None
        if chosen:
            self.block_size = KERNEL_BLOCK_SIZE[current_platform.device_type]
        if current_platform.is_cpu():
            fit_default_memory(self)
        else:
            _use_our_attention(self)
        vllm_config = stock(self, *args, **kwargs)
        _drop_idle_window(vllm_config)
        if current_platform.is_cuda() and has_windows(vllm_config):
            _leave_windows_their_kernels(vllm_config)
        check_config(self, vllm_config)
        config.check_block_size(vllm_config.cache_config.block_size, flag)
        segment = server_settings(vllm_config).segment_tokens
        config = resolved(config, vllm_config.model_config)
        check_store(config, vllm_config)
        _use_our_classes(vllm_config, config)
        _allow_long_steps()
        global _compresses
        _compresses = True
        if not quiet:
            logger.info("%s", _start_up_line(vllm_config, config, segment, chosen))
        return vllm_config

    return create_engine_config


def _as_compressed(stock: Callable[..., int]) -> Callable[..., int]:
    def max_memory_usage_bytes(*args: Any) -> int:
        exact = stock(*args)
        *_, vllm_config, _ = args  # vLLM 0.33 has its builder of the KV cache's configuration in front
        config = CompressionConfig.from_additional_config(vllm_config.additional_config)
        if not config.active or exact == 0:
            return exact
        if not outgrows_memory(vllm_config, config):
            return exact
        # In short segments, which a context takes if there is not memory for others.
        config = config.in_short_segments() or server_settings(vllm_config)
        blocks = -(-vllm_config.model_config.max_model_len // vllm_config.cache_config.block_size)
        return exact // blocks * min(blocks, blocks_of_longest(vllm_config, config))

    return max_memory_usage_bytes


def _use_our_attention(args: EngineArgs) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    check_attention_backend(args)
    # The workers register it too; here it is looked up while vLLM makes its configuration.
    register_backend(AttentionBackendEnum.CUSTOM, TRITON_BACKEND)
    args.attention_backend, args.attention_config.backend = AttentionBackendEnum.CUSTOM, None


def _leave_windows_their_kernels(vllm_config: VllmConfig) -> None:
    """Let layers that see a window be read by the kernels that vLLM chooses; ours read those that see everything."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = vllm_config.attention_config
    attention.backend, attention.backend_per_kind = None, {FULL: AttentionBackendEnum.CUSTOM}


def _drop_idle_window(vllm_config: VllmConfig) -> None:
    """Take a window that no context outgrows for the full attention that it is, as --disable-sliding-window does."""
    model = vllm_config.model_config
    window = model.get_sliding_window()
    if window is not None and window >= model.max_model_len:
        model.disable_sliding_window = True
        model.hf_text_config.sliding_window = vllm_config.cache_config.sliding_window = None


def _allow_long_steps() -> None:
    # A step that compresses a long prompt on a CPU takes minutes; vLLM would take that for a hung worker after 5. The
    # engine's processes, which start later, inherit it; a value of the user's own stays.
    os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "3600")


def _use_our_classes(vllm_config: VllmConfig, config: CompressionConfig) -> None:
    # As strings: each process imports them itself.
    vllm_config.parallel_config.worker_cls = WORKERS[current_platform.device_type]
    scheduler_config = vllm_config.scheduler_config
    scheduler_config.scheduler_cls = ASYNC_SCHEDULER if scheduler_config.async_scheduling else SCHEDULER
    # However it was spelled, one configuration is one entry of the compile hash.
    given = vllm_config.additional_config
    assert isinstance(given, Mapping)  # it has an entry of ours
    vllm_config.additional_config = {**given, KEY: config.model_dump()}


def _start_up_line(vllm_config: VllmConfig, config: CompressionConfig, segment: int, block_size_chosen: bool) -> str:
    budgets = config.budget
    shorter = f" ({SEGMENT} if the KV cache is short)" if config.segment == "auto" and segment > SEGMENT else ""
    if config.calibration != NONE and config.budget == "adaptive":
        budgets += f" (sculpt's by {config.calibration})"
    elif config.method == "sculpt" and config.budget == "adaptive":
        budgets += " (by a pilot on each prompt, which `kvsculpt calibrate` can save)"
    return (
        f"KV compression: active, because --kv-compression is {config.method}. "
        f"Keeps {config.amount}, budget {budgets}, prompts from {config.min_tokens} tokens "
        f"in segments of {segment}{shorter}, store {shown(config.store)}, "
        f"block size {vllm_config.cache_config.block_size}{' (chosen, the smallest)' if block_size_chosen else ''}, "
        f"layout {requested_layout() or DEFAULT_LAYOUT}, "
        f"model runner {'V2' if vllm_config.use_v2_model_runner else 'V1'}"
        f"{'' if current_platform.is_cpu() else f'. Kernels: {TRUST}'}."
    )
