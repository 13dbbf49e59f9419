"""Settings of single requests, checked where vLLM takes a request: a wrong one is an HTTP 400."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvsculpt_vllm.config import CompressionConfig, ConfigError, WrongSetting, request_key, request_settings
from kvsculpt_vllm.engine.compat.patcher import apply
from kvsculpt_vllm.engine.compat.patches import (
    CREATE_CHAT_COMPLETION,
    CREATE_COMPLETION,
    CREATE_RESPONSES,
    GENERATE,
    PROCESS_INPUTS,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_request(vllm_config: VllmConfig, extra_args: Mapping[str, Any] | None, beam_search: bool = False) -> None:
    """Check the `kv_compression*` entries of a request's extra arguments, `vllm_xargs` in the API.

    Raises:
        VLLMValidationError: naming every wrong setting, what was given and what is allowed.
    """
    if not extra_args or not (given := request_settings(extra_args)):
        return
    from vllm.exceptions import VLLMValidationError

    try:
        config = CompressionConfig.from_additional_config(vllm_config.additional_config).for_request(extra_args)
        config.check_block_size(vllm_config.cache_config.block_size, request_key)
        if beam_search and config.active:
            # vLLM makes a new one-token request of every step and passes no extra arguments to it.
            cure = "only kv_compression none together with use_beam_search, which is never compressed"
            raise ConfigError([WrongSetting(key, value, cure) for key, value in given.items()])
    except ConfigError as error:
        raise VLLMValidationError(str(error), parameter=error.option, value=error.given) from None


def install_request_checks() -> None:
    """Check every request of this process, once; only a process that makes an engine needs it.

    `InputProcessor.process_inputs` sees all requests, but a streamed one after its HTTP 200 was sent: there, the
    engine runs nothing before its first result is awaited. So the API is checked at its entrance too.
    """
    for patch, make in (
        (PROCESS_INPUTS, _checked_process_inputs),
        (GENERATE, _checked_generate),
        (CREATE_CHAT_COMPLETION, _checked_endpoint),
        (CREATE_COMPLETION, _checked_endpoint),
        (CREATE_RESPONSES, _checked_endpoint),
    ):
        apply(patch, make)


def _checked_process_inputs(stock: Callable) -> Callable:
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        # Pooling parameters have no extra_args and pass.
        check_request(self.vllm_config, getattr(params, "extra_args", None))
        return stock(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs


def _checked_generate(stock: Callable) -> Callable:
    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        check_request(self.vllm_config, sampling_params.extra_args)
        return stock(self, prompt, sampling_params, *args, **kwargs)

    return generate


def _checked_endpoint(stock: Callable) -> Callable:
    async def create(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        beam_search = getattr(request, "use_beam_search", False)
        check_request(self.engine_client.vllm_config, request.vllm_xargs, beam_search)
        return await stock(self, request, *args, **kwargs)

    return create
