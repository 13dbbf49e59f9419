"""Settings of single requests, checked where vLLM takes a request: a wrong one is an HTTP 400."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvsculpt_vllm.config import CompressionConfig, ConfigError, WrongSetting, request_key, request_settings
from kvsculpt_vllm.engine.compat.patcher import apply
from kvsculpt_vllm.engine.compat.patches import (
    CREATE_BATCH_CHAT_COMPLETION,
    CREATE_CHAT_COMPLETION,
    CREATE_COMPLETION,
    CREATE_RESPONSES,
    CREATE_TRANSCRIPTION,
    CREATE_TRANSLATION,
    GENERATE,
    PROCESS_INPUTS,
    READ_BATCH_FILE_0_32,
    RENDER,
    RUN_BATCH_REQUEST,
)
from kvsculpt_vllm.engine.shared.capacity import blocks_of_engine, most_tokens, server_settings
from kvsculpt_vllm.engine.shared.prefix_wish import WISH_KEY, is_forged
from kvsculpt_vllm.engine.shared.spans import is_repetition

if TYPE_CHECKING:
    from fastapi import Request
    from vllm.config import VllmConfig

_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


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


def check_wish(extra_args: Mapping[str, Any] | None) -> None:
    """Check that a request that wants a prefix to be kept is one of our own.

    Raises:
        VLLMValidationError: a client has sent it.
    """
    if is_forged(extra_args):
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(f"{WISH_KEY} is the server's own: POST /kvsculpt/prefixes", parameter=WISH_KEY)


def check_length(vllm_config: VllmConfig, prompt: Any, params: Any) -> None:
    """Check that a prompt fits into the KV cache's memory, as it is or compressed.

    Only where --max-model-len is more than the memory holds uncompressed: else every prompt does.

    Raises:
        VLLMValidationError: says how many tokens it has and how many are allowed.
    """
    tokens = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    blocks = blocks_of_engine(vllm_config)
    if tokens is None or blocks is None:
        return
    ours = server_settings(vllm_config, blocks)
    if not ours.active:
        return
    config, why = ours.for_request(getattr(params, "extra_args", None)), ""
    if getattr(params, "prompt_logprobs", None) is not None:
        config, why = CompressionConfig(), " with prompt_logprobs, which are exact"
    elif not config.active:
        why = " with kv_compression none"
    elif is_repetition(tokens):
        config, why = CompressionConfig(), ", as a few tokens over and over are not compressed"
    longest = most_tokens(vllm_config, config, blocks)
    most = longest - 1  # and one of the answer
    # What is longer than --max-model-len vLLM refuses itself.
    if len(tokens) > most and longest < vllm_config.model_config.max_model_len:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"the prompt has {len(tokens)} tokens, and at most {most} fit into the KV cache's memory{why}",
            parameter="prompt",
            value=len(tokens),
        )


def install_request_checks() -> None:
    """Check every request of this process, once; only a process that makes an engine needs it.

    `InputProcessor.process_inputs` sees all requests, but a streamed one after its HTTP 200 was sent: there, the
    engine runs nothing before its first result is awaited. So the API is checked at its entrance too, where a body is
    still as the client wrote it: vLLM's type of `vllm_xargs` makes 1 of `true`.
    """
    for patch, make in (
        (PROCESS_INPUTS, _checked_process_inputs),
        (GENERATE, _checked_generate),
        (CREATE_CHAT_COMPLETION, _checked_endpoint),
        (CREATE_COMPLETION, _checked_endpoint),
        (CREATE_RESPONSES, _checked_endpoint),
        (CREATE_BATCH_CHAT_COMPLETION, _checked_endpoint),
        (CREATE_TRANSCRIPTION, _checked_audio_endpoint),
        (CREATE_TRANSLATION, _checked_audio_endpoint),
        (RENDER, _checked_render),
        (RUN_BATCH_REQUEST, _with_booleans_told),
        (READ_BATCH_FILE_0_32, _with_booleans_of_all_told),
    ):
        apply(patch, make)


async def settings_of(request: Any, raw_request: Request | None) -> dict[str, Any]:
    """A request's settings of ours, as its client wrote them where a client wrote a body."""
    given = request_settings(_mapping(getattr(request, "vllm_xargs", None)))
    if not given or raw_request is None:
        return given
    try:
        written = await _written_xargs(raw_request)
    except (RuntimeError, ValueError):
        return given  # another program's request, with headers only
    return given | request_settings(_mapping(written))


async def _written_xargs(raw_request: Request) -> Any:
    # FastAPI has parsed the body, and parses it once only.
    if raw_request.headers.get("content-type", "").lower().startswith(_FORMS):
        written = (await raw_request.form())["vllm_xargs"]
        return json.loads(written) if isinstance(written, str) else None  # an uploaded file says nothing
    return _mapping(await raw_request.json()).get("vllm_xargs")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


async def _check_at_the_entrance(vllm_config: VllmConfig, request: Any, raw_request: Request | None) -> None:
    check_wish(_mapping(getattr(request, "vllm_xargs", None)))
    beam_search = getattr(request, "use_beam_search", False)
    check_request(vllm_config, await settings_of(request, raw_request), beam_search)


def _checked_process_inputs(stock: Callable) -> Callable:
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        # Pooling parameters have no extra_args and pass.
        check_wish(getattr(params, "extra_args", None))
        check_request(self.vllm_config, getattr(params, "extra_args", None))
        check_length(self.vllm_config, prompt, params)
        return stock(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs


def _checked_generate(stock: Callable) -> Callable:
    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        check_wish(sampling_params.extra_args)
        check_request(self.vllm_config, sampling_params.extra_args)
        check_length(self.vllm_config, prompt, sampling_params)
        return stock(self, prompt, sampling_params, *args, **kwargs)

    return generate


def _checked_endpoint(stock: Callable) -> Callable:
    async def create(self: Any, request: Any, raw_request: Request | None = None) -> Any:
        await _check_at_the_entrance(self.engine_client.vllm_config, request, raw_request)
        return await stock(self, request, raw_request)

    return create


def _checked_audio_endpoint(stock: Callable) -> Callable:
    async def create(self: Any, audio_data: bytes, request: Any, raw_request: Request | None = None) -> Any:
        await _check_at_the_entrance(self.engine_client.vllm_config, request, raw_request)
        return await stock(self, audio_data, request, raw_request)

    return create


def _checked_render(stock: Callable) -> Callable:
    def render(request: Request) -> Any:
        handler = stock(request)
        return None if handler is None else _CheckedRender(handler, request)

    return render


class _CheckedRender:
    """vLLM's handler of the routes that turn a request into one for `/inference/v1/generate`, for one call of them.

    What they answer has settings of ours narrowed, and not all of its methods are given the raw request.
    """

    def __init__(self, handler: Any, raw_request: Request) -> None:
        self._handler, self._raw_request = handler, raw_request

    def __getattr__(self, name: str) -> Callable:
        method = getattr(self._handler, name)

        async def checked(request: Any, *args: Any) -> Any:
            state = self._raw_request.app.state
            await _check_at_the_entrance(state.engine_client.vllm_config, request, self._raw_request)
            return await method(request, *args)

        return checked


def _with_booleans_told(stock: Callable) -> Callable:
    async def run_one_request(request_json: str, *args: Any, **kwargs: Any) -> Any:
        return await stock(_booleans_told(request_json), *args, **kwargs)

    return run_one_request


def _with_booleans_of_all_told(stock: Callable) -> Callable:
    async def read_file(path_or_url: str) -> str:
        return "\n".join(map(_booleans_told, (await stock(path_or_url)).split("\n")))

    return read_file


def _booleans_told(line: str) -> str:
    """A line of a file for `vllm run-batch` with the booleans in settings of ours as text, which no setting may be.

    vLLM parses a line and calls the endpoint without what was written.
    """
    try:
        request = json.loads(line)
        settings = request_settings(request["body"]["vllm_xargs"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return line  # vLLM says what is wrong with it, or it has no settings
    booleans = {key: json.dumps(value) for key, value in settings.items() if isinstance(value, bool)}
    if not booleans:
        return line
    request["body"]["vllm_xargs"] |= booleans
    return json.dumps(request)
