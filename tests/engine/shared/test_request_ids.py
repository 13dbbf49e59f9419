"""An answer's id finds its requests and no others. The engine's ids are those that vLLM's own endpoints make."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import AsyncMock, MagicMock

import pytest
from vllm import SamplingParams
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.generate.label_reads import next_token_label_reads
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.entrypoints.speech_to_text.base.serving import SpeechToTextBaseServing
from vllm.sampling_params import BeamSearchParams
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

from kvsculpt_vllm.engine.shared.commands import Settled
from kvsculpt_vllm.engine.shared.ledger import Ledger
from kvsculpt_vllm.engine.shared.request_ids import find

PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 3]}


class Done(Exception):
    """Ends an endpoint that waits for results: its requests are known then."""


async def no_results():
    raise Done
    yield


async def empty_results():
    return
    yield


class Serving(MagicMock):
    """Stands in for an endpoint, whose methods are called with it. `ids` are those that the engine is asked with."""

    def __init__(self, results=no_results, **more):
        super().__init__()
        self.ids, self.results = [], results
        self.engine_client.generate.side_effect = self.beam_search = self.generate
        self.engine_client.vllm_config.scheduler_config.max_num_seqs = 8
        self._base_request_id = GenerateBaseServing._base_request_id
        self._extract_prompt_len.return_value, self.model_config.max_model_len = 3, 64
        self.model_config.is_encoder_decoder = False
        self.default_sampling_params, self.override_max_tokens, self.parser_cls = {}, None, None
        self._engine_reasoning_kwargs.return_value = {}
        self._check_model = AsyncMock(return_value=None)
        for name, value in more.items():
            setattr(self, name, value)

    def _get_child_mock(self, **settings):
        return MagicMock(**settings)

    def generate(self, *args, request_id=None, **settings):
        self.ids.append(request_id or args[2])
        return self.results()


def raw_request(request_id):
    return SimpleNamespace(headers={"X-Request-Id": request_id}, state=SimpleNamespace())


async def asked(serving, endpoint, request, request_id, *args):
    """The ids that an endpoint asks the engine with."""
    with suppress(Done):
        await endpoint(serving, *args, request, raw_request(request_id))
    return serving.ids


def chat(request_id, beam=False):
    serving = Serving(render_chat_request=AsyncMock(return_value=([], [PROMPT])), _get_trace_headers=AsyncMock())
    request = ChatCompletionRequest(messages=[], stream=True, use_beam_search=beam)
    return asked(serving, OpenAIServingChat._create_chat_completion, request, request_id)


def completions(request_id, beam=False):
    rendered = AsyncMock(return_value=[PROMPT] * 2)
    serving = Serving(render_completion_request=rendered, _get_trace_headers=AsyncMock())
    request = CompletionRequest(prompt="a", stream=not beam, use_beam_search=beam)
    return asked(serving, OpenAIServingCompletion._create_completion, request, request_id)


def batched_chat(request_id):
    single = ChatCompletionRequest(messages=[])
    rendered = AsyncMock(return_value=([single] * 2, [[]] * 2, [PROMPT] * 2))
    serving = Serving(
        render_batch_chat_request=rendered,
        _get_trace_headers=AsyncMock(),
        chat_completion_full_generator_batch=AsyncMock(),
    )
    request = MagicMock(max_completion_tokens=4)
    return asked(serving, OpenAIServingChatBatch.create_batch_chat_completion, request, request_id)


async def responses(request_id):
    """Two turns, with a tool between them."""
    serving = Serving(empty_results)
    context = MagicMock(call_tool=AsyncMock())
    context.need_builtin_tool_call.side_effect = [True, False]
    turns = OpenAIServingResponses._generate_with_builtin_tools(serving, request_id, PROMPT, SamplingParams(), context)
    async for _ in turns:
        pass
    return serving.ids


def tokens(request_id):
    serving = Serving(has_tokenizer=True, force_no_detokenize=False, _get_trace_headers=AsyncMock())
    serving.online_renderer.preprocess_completion = AsyncMock(return_value=(PROMPT,))
    request = GenerateRequest(token_ids=[1, 2, 3], sampling_params=SamplingParams(n=2), stream=True)
    return asked(serving, ServingTokens.serve_tokens, request, request_id)


def speech(request_id, chunks=2, beam=False):
    serving = Serving(
        task_type="transcribe",
        _preprocess_speech_to_text=AsyncMock(return_value=([PROMPT] * chunks, 1.0, [0.0] * chunks)),
        _get_trace_headers=AsyncMock(),
    )
    request = MagicMock(stream=not beam, response_format="json", use_beam_search=beam, max_completion_tokens=4)

    async def endpoint(self, audio, request, raw):
        await SpeechToTextBaseServing._create_speech_to_text(self, audio, request, raw, MagicMock, MagicMock())

    return asked(serving, endpoint, request, request_id, b"")


async def label_reads(request_id):
    """Of /generative_scoring and /v1/systemone, which put their names in front."""
    serving = Serving()
    with suppress(Done):
        await next_token_label_reads(serving.engine_client, [PROMPT] * 2, [SamplingParams()] * 2, request_id)
    return serving.ids


async def beams(request_id):
    """The first step of a beam search."""
    serving = Serving(no_results)
    serving.renderer.get_tokenizer.return_value.eos_token_id = 0
    with suppress(Done):
        async for _ in GenerateBaseServing.beam_search(
            serving, PROMPT, request_id, BeamSearchParams(beam_width=2, max_tokens=1)
        ):
            pass
    return serving.ids


def engine_ids(ids, answers=1):
    """What the engine calls the requests of these ids."""
    result = []
    for external in ids:
        request = SimpleNamespace(request_id=external, external_req_id=None, params=SamplingParams(n=answers))
        InputProcessor.assign_request_id(request)
        if answers == 1:
            result.append(request.request_id)
        else:
            parent = ParentRequest(request)
            result += [parent.get_child_info(i)[0] for i in range(answers)]
    return result


def made(name, answers=1):
    """Calls an endpoint with an id that its client chose, and gives the engine's ids of what it asks for."""
    endpoint, _, beam = ENDPOINTS[name]

    async def all_of(request_id):
        ids = await endpoint(request_id)
        return [step for external in ids for step in await beams(external)] if beam else ids

    return lambda request_id: engine_ids(asyncio.run(all_of(request_id)), answers)


ENDPOINTS = {
    "/v1/chat/completions": (chat, "chatcmpl-", False),
    "/v1/chat/completions, beams": (lambda name: chat(name, beam=True), "chatcmpl-", True),
    "/v1/chat/completions/batch": (batched_chat, "chatcmpl-", False),
    "/v1/completions": (completions, "cmpl-", False),
    "/v1/completions, beams": (lambda name: completions(name, beam=True), "cmpl-", True),
    "/v1/responses": (lambda name: responses(f"resp_{name}"), "resp_", False),
    "/v1/responses, id of its own": (responses, "", False),
    "/inference/v1/generate": (tokens, "generate-tokens-", False),
    "/v1/audio/transcriptions": (speech, "transcribe-", False),
    "/v1/audio/transcriptions, one chunk": (lambda name: speech(name, chunks=1), "transcribe-", False),
    "/v1/audio/transcriptions, beams": (lambda name: speech(name, beam=True), "transcribe-", True),
    "/generative_scoring": (lambda name: label_reads(f"generative-scoring-{name}"), "generative-scoring-", False),
    "/v1/systemone": (lambda name: label_reads(f"decision-{name}"), "decision-", False),
}
SEVERAL_ANSWERS = ("/v1/chat/completions", "/v1/completions", "/inference/v1/generate")
CASES = [(name, 1) for name in ENDPOINTS] + [(name, 2) for name in SEVERAL_ANSWERS]


@pytest.mark.parametrize(("name", "answers"), CASES, ids=lambda value: str(value).strip("/"))
def test_the_id_of_an_answer_finds_all_requests_made_of_it_and_none_of_similar_ids(name, answers):
    make, prefix = made(name, answers), ENDPOINTS[name][1]
    own = make("ab")
    assert len(own) == len(set(own)) >= 1
    others = [
        engine_id
        for similar in ("abc", "a", "xab", "ab-c", "ab_c", "ab0", "ab.", "ab-0-0", "ab_0_0", "0_ab_0", "AB")
        for engine_id in make(similar)
    ]
    assert set(find(f"{prefix}ab", [*others, *own])) == set(own)
    assert find(f"{prefix}ab", others) == []
    for engine_id in own:
        assert find(engine_id, [*others, *own]) == [engine_id]


@pytest.mark.parametrize("name", ["/v1/chat/completions", "/inference/v1/generate", "/v1/completions"])
def test_an_id_that_goes_on_with_a_number_is_another_one(name):
    make, prefix = made(name), ENDPOINTS[name][1]
    number = "_1" if name == "/v1/completions" else "-1"
    own, other = make("ab"), make(f"ab{number}")
    assert find(f"{prefix}ab", [*other, *own]) == own
    assert find(f"{prefix}ab", other) == []
    assert find(f"{prefix}ab{number}", [*other, *own]) == other


def test_of_two_names_that_a_number_tells_apart_the_one_that_was_asked_for_is_found():
    """A chat may be called as a batched chat's conversation is: only what is there tells which of them is meant."""
    chats = made("/v1/chat/completions")
    own, other = chats("ab"), chats("ab_1")
    assert find("chatcmpl-ab", [*other, *own]) == own
    assert find("chatcmpl-ab_1", [*other, *own]) == other


def test_requests_of_a_program_are_found_by_their_number():
    """`LLM` counts its requests, and `0_5` is the first answer of number 5, not a part of number 0."""
    five, fifteen = engine_ids(["5"], answers=2), engine_ids(["15"], answers=2)
    assert find("5", [*fifteen, *five]) == five
    assert find("0", five) == find("1", five) == []


def test_ids_are_found_where_vllm_adds_nothing_to_them(monkeypatch):
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    for name, answers in CASES:
        make, prefix = made(name, answers), ENDPOINTS[name][1]
        own, others = make("ab"), [*make("abc"), *make("ab-0123abcd")]
        assert set(find(f"{prefix}ab", [*others, *own])) == set(own), name


def test_the_newest_of_several_requests_is_told():
    ledger = Ledger(1)
    first, second = engine_ids(asyncio.run(responses("resp_ab")))
    ledger.hear(Settled(second, 5, "skipped", "short"))
    ledger.hear(Settled(first, 7, "skipped", "off"))
    assert ledger.find("resp_ab")["request_id"] == first
    assert ledger.find("resp_ab_1")["request_id"] == second
    assert ledger.find("resp_a") is ledger.find("resp_abc") is None
