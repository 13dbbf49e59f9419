"""What a client writes is what is checked, at every route of vLLM that takes settings; no engine."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.testclient import TestClient
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.api_router import register_generate_api_routers
from vllm.entrypoints.launchers import run_batch
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.scale_out.factories import register_scale_out_api_routers
from vllm.entrypoints.scale_out.render.serving import ServingRender
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.sagemaker.api_router import attach_router as attach_sagemaker
from vllm.entrypoints.speech_to_text.factories import register_speech_to_text_api_routers
from vllm.entrypoints.speech_to_text.transcription.serving import OpenAIServingTranscription
from vllm.entrypoints.speech_to_text.translation.serving import OpenAIServingTranslation
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from kvsculpt_vllm.config import SERVER_ONLY, CompressionConfig, choices, request_key
from kvsculpt_vllm.engine.compat import patches
from kvsculpt_vllm.engine.compat.patches import PATCHES
from kvsculpt_vllm.engine.startup import request_checks
from kvsculpt_vllm.plugin import installed_vllm

MESSAGES = [{"role": "user", "content": "a"}]
BODIES = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/chat/completions/batch": {"messages": [MESSAGES]},
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 3},
    "/invocations": {"messages": MESSAGES},
    "/v1/chat/completions/render": {"messages": MESSAGES},
    "/v1/completions/render": {"prompt": "a"},
    "/v1/responses/render": {"input": "a"},
    "/v1/messages/render": {"messages": MESSAGES, "max_tokens": 3},
    "/v1/audio/transcriptions": {},
    "/v1/audio/translations": {},
}
TAKE_MORE_THAN_THEIR_MODEL_HAS = {"/v1/chat/completions/batch", "/invocations"}
NUMBERS = [request_key(f) for f in CompressionConfig.model_fields if f not in SERVER_ONLY and not choices(f)]
REACHED = 418

ENDPOINTS = [
    patch
    for patch in PATCHES
    if patch.can_go_when == patches.CREATE_RESPONSES.can_go_when
    and patch not in (patches.PROCESS_INPUTS, patches.GENERATE, patches.RENDER)
]


@pytest.fixture(scope="module")
def seen():
    """The requests that came through our checks."""
    return []


@pytest.fixture(scope="module")
def server(seen):
    """vLLM's routes and our checks, and behind them nothing but an answer that says which request was let through."""

    async def stub(self, *args):
        seen.append(args)
        return ErrorResponse(error=ErrorInfo(message="let through", type="Reached", code=REACHED))

    async def no_effort(request):  # of Anthropic's messages, in vLLM 0.33
        return None

    config = SimpleNamespace(additional_config={"kv_compression": "sculpt"})
    config.cache_config, config.model_config = SimpleNamespace(block_size=32), None
    engine = SimpleNamespace(vllm_config=config)
    app = FastAPI()
    app.state.args = SimpleNamespace(enable_scale_out=True, log_error_stack=False)
    app.state.engine_client = engine
    tasks = ("generate", "transcription")
    register_generate_api_routers(app)
    register_scale_out_api_routers(app, tasks)
    register_speech_to_text_api_routers(app, tasks)
    attach_sagemaker(app, tasks)
    init_exception_handler(app)
    with pytest.MonkeyPatch.context() as patched:
        for patch in ENDPOINTS:
            patched.setattr(*patch.find(), stub)
        for name in ("chat", "messages", "completion", "responses"):
            patched.setattr(ServingRender, f"render_{name}_request", stub)
        render_module, render = patches.RENDER.find()
        patched.setattr(render_module, render, getattr(render_module, render))
        request_checks.install_request_checks()
        for name, kind in {
            "openai_serving_chat": OpenAIServingChat,
            "openai_serving_chat_batch": OpenAIServingChatBatch,
            "openai_serving_completion": OpenAIServingCompletion,
            "openai_serving_responses": OpenAIServingResponses,
            "anthropic_serving_messages": AnthropicServingMessages,
            "openai_serving_transcription": OpenAIServingTranscription,
            "openai_serving_translation": OpenAIServingTranslation,
            "serving_render": ServingRender,
        }.items():
            handler = kind.__new__(kind)
            handler.engine_client, handler._merge_inline_system = engine, False
            handler.disabled_thinking_effort_resolver = SimpleNamespace(resolve_for=no_effort)
            setattr(app.state, name, handler)
        yield TestClient(app)


def send(server, path, xargs, **more):
    body = {"model": "m"} | BODIES[path] | more
    if "/audio/" in path:
        return server.post(path, data=body | {"vllm_xargs": json.dumps(xargs)}, files={"file": b"sound"})
    return server.post(path, json=body | {"vllm_xargs": xargs})


def test_the_table_has_every_route_that_takes_settings(server):
    taking = {
        route.path
        for route in server.app.routes
        if isinstance(route, APIRoute)
        for field in route.dependant.body_params
        if "vllm_xargs" in getattr(field.field_info.annotation, "model_fields", {})
    }
    assert taking | TAKE_MORE_THAN_THEIR_MODEL_HAS == set(BODIES)


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("path", BODIES)
def test_a_boolean_is_no_number(server, path, key):
    for value in (True, False, [True], [[True]], {"a": True}, {"a": [1, {"b": False}]}):
        for stream in (False, True):
            answer = send(server, path, {key: value}, **({"stream": stream} if "batch" not in path else {}))
            assert answer.status_code == 400, (value, answer.text)
            if isinstance(value, bool):
                assert f"{key}: got {value}, allowed: a " in answer.text


@pytest.mark.parametrize("path", BODIES)
def test_all_other_values_come_through_as_before(server, seen, path):
    for xargs in ({"kv_compression_keep_ratio": 0.5, "of_others": True}, {"of_others": True}, {"of_others": [True]}):
        assert send(server, path, xargs).status_code == REACHED
        request = next(arg for arg in seen[-1] if hasattr(arg, "vllm_xargs"))
        assert request.vllm_xargs == xargs  # 1 == True: as vLLM has it


@pytest.mark.parametrize("path", BODIES)
def test_without_settings_of_ours_no_body_is_asked_for(server, monkeypatch, path):
    monkeypatch.setattr(request_checks, "_written_xargs", lambda raw_request: pytest.fail("parsed again"))
    for xargs in ({}, {"of_others": True}):
        assert send(server, path, xargs).status_code == REACHED


def test_settings_of_requests_without_a_body_are_those_that_vllm_has():
    """`vllm run-batch` has no HTTP request; Ray Serve makes one that has headers only."""
    request = ChatCompletionRequest(messages=MESSAGES, vllm_xargs={"kv_compression_window": 16})
    for raw_request in (None, Request({"type": "http", "headers": []})):
        assert asyncio.run(request_checks.settings_of(request, raw_request)) == {"kv_compression_window": 16}


def test_tokens_in_keeps_booleans_and_the_engine_refuses_them(server):
    """`/inference/v1/generate` has no vllm_xargs: extra arguments of its sampling parameters stay as they are."""
    handler = ServingTokens.__new__(ServingTokens)
    assert "vllm_xargs" not in vars(type(handler))
    body = {"token_ids": [1], "sampling_params": {"extra_args": {"kv_compression_window": True}}}
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    params = GenerateRequest.model_validate(body).sampling_params
    assert params.extra_args == {"kv_compression_window": True} and params.extra_args["kv_compression_window"] is True
    engine = server.app.state.engine_client
    with pytest.raises(VLLMValidationError, match="kv_compression_window: got True"):
        AsyncLLM.generate(engine, "prompt", params, "id")


def read_as_run_batch_does(path):
    """The lines of a file as `vllm run-batch` gives them on: all of them in vLLM 0.32, one after the other in 0.33."""
    if patches.READ_BATCH_FILE_0_32.is_for(installed_vllm()):
        return asyncio.run(run_batch.read_file(str(path))).split("\n")
    read = []

    async def run_one_request(request_json, endpoint_registry):
        read.append(request_json)

    owner, name = patches.RUN_BATCH_REQUEST.find()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, run_one_request)
        request_checks.install_request_checks()
        for line in path.read_text().split("\n"):
            asyncio.run(owner.run_one_request(line, {}))
    return read


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/audio/transcriptions"])
def test_a_batch_file_keeps_what_was_written(tmp_path, url):
    request_checks.install_request_checks()
    body = {"messages": MESSAGES} if "chat" in url else {"file_url": "data:,"}
    lines = [
        {"custom_id": str(i), "method": "POST", "url": url, "body": {"model": "m", **body, "vllm_xargs": xargs}}
        for i, xargs in enumerate(
            [{"kv_compression_window": True, "of_others": True}, {"kv_compression_window": 16, "of_others": [True]}]
        )
    ]
    plain = {"custom_id": "2", "method": "POST", "url": url, "body": {"model": "m", **body}}
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join([*map(json.dumps, lines), "", json.dumps(plain), "{not json", "[]"]))
    read = read_as_run_batch_does(path)
    assert read[2:] == ["", json.dumps(plain), "{not json", "[]"]
    first, second = (run_batch.BatchRequestInput.model_validate_json(line).body.vllm_xargs for line in read[:2])
    assert first == {"kv_compression_window": "true", "of_others": 1}
    assert second == lines[1]["body"]["vllm_xargs"]
    config = SimpleNamespace(
        additional_config={"kv_compression": "sculpt"}, cache_config=SimpleNamespace(block_size=32)
    )
    request_checks.check_request(config, second)
    with pytest.raises(VLLMValidationError, match="kv_compression_window: got 'true'"):
        request_checks.check_request(config, first)
