"""HTTP routes for prefixes by name: have one sculpted before anybody asks about it, keep it, list them, free one."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, Self

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from kvsculpt_vllm.config import request_key
from kvsculpt_vllm.engine.compat.frontend import ask_schedulers
from kvsculpt_vllm.engine.shared.prefix_wish import Wish, granted
from kvsculpt_vllm.engine.shared.reasons import MEANINGS, Outcome
from kvsculpt_vllm.engine.startup.request_checks import check_request
from kvsculpt_vllm.serving.patience import PATIENCE_SECONDS, answered

router = APIRouter(prefix="/prefixes")

LONGEST_NAME = 200


class NewPrefix(BaseModel):
    """What is to be sculpted: the beginning that later requests will have. One of `messages` and `prompt`."""

    model_config = ConfigDict(extra="forbid")

    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    prompt: str | None = Field(default=None, min_length=1)
    tools: list[dict[str, Any]] | None = None  # which chat templates put before the messages
    chat_template_kwargs: dict[str, Any] | None = None
    model: str | None = None  # as in vLLM's API: the server's, or one of its LoRA adapters
    cache_salt: str | None = Field(default=None, min_length=1)
    name: str = Field(default="", max_length=LONGEST_NAME)
    pin: bool = False
    ttl: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # seconds
    effort: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either messages or prompt")
        for message in self.messages or ():
            content = message.get("content")
            if isinstance(content, list) and any(part.get("type", "text") != "text" for part in content):
                raise ValueError("messages must be text: of images and the like, tokens do not tell all")
        if self.prompt is not None and (self.tools is not None or self.chat_template_kwargs is not None):
            raise ValueError("tools and chat_template_kwargs belong to messages")
        return self


class KeptPrefix(BaseModel):
    """A prefix that was sculpted by name."""

    id: str
    name: str
    prompt_tokens: int
    tokens: int  # that its segments stand for; the rest, about a window's, is computed with each request
    tokens_in_memory: int  # the others are made, or read from the store, when they are next asked for
    blocks: int
    bytes: int
    held_out_error: float  # the largest of its segments
    pinned: bool
    hits: int  # requests that began with all of it
    age_seconds: float
    expires_in_seconds: float | None


class KeptPrefixes(BaseModel):
    """All of them, and the room for pins, over all engines."""

    pinned_blocks: int
    most_pinned_blocks: int
    prefixes: list[KeptPrefix]


class MadePrefix(BaseModel):
    """What became of a wish."""

    id: str
    name: str
    pinned: bool
    prompt_tokens: int
    tokens_found: int  # of which there were segments already
    tokens_sculpted: int
    segments: int
    entries_held: int
    held_out_error: float
    reason: str  # why there is less than there should be; else empty


@router.post("", status_code=201)
@with_cancellation
async def make_prefix(wanted: NewPrefix, raw_request: Request) -> MadePrefix:
    """Sculpt a prefix, without an answer. Requests that begin with it find it by its tokens."""
    request, client = raw_request, raw_request.app.state.kvsculpt_monitor.client
    settings = {} if wanted.effort is None else {request_key("effort"): wanted.effort}
    try:
        check_request(client.vllm_config, settings)
        await _check_conflicts(request, wanted)
        tokens = await _tokens_of(request, wanted)
        wish = Wish(f"prefix-{uuid.uuid4().hex[:16]}", wanted.name, wanted.pin, wanted.ttl)
        prompt: dict[str, Any] = {"prompt_token_ids": tokens}
        if wanted.cache_salt is not None:
            prompt["cache_salt"] = wanted.cache_salt
        final = None
        with granted(wish, settings) as params:
            async for output in client.generate(prompt, params, wish.prefix_id, lora_request=_adapter(request, wanted)):
                final = output
    except (VLLMValidationError, ValueError) as error:
        raise HTTPException(400, str(error)) from None
    except EngineDeadError:
        raise HTTPException(503, "the engine has stopped") from None
    story = ((final and final.kv_transfer_params) or {}).get("kv_compression")
    if story is None or final is None or final.outputs[0].finish_reason != "length":
        raise HTTPException(503, "the engine ended the request before its prefix was made")
    if not story["segments"]:
        raise HTTPException(
            400 if story["outcome"] == Outcome.SKIPPED else 503,
            f"it was not sculpted: {MEANINGS.get(story['reason'], story['outcome'])}",
        )
    if wanted.pin and not story["pinned"]:
        await _ask(request, "remove_prefix", wish.prefix_id, False)
        raise HTTPException(409, f"it is sculpted, and there is no room to pin it: {await _pins(request)}")
    return MadePrefix(id=wish.prefix_id, name=wanted.name, **{k: story[k] for k in _TOLD})


_TOLD = MadePrefix.model_fields.keys() - {"id", "name"}


@router.get("")
async def list_prefixes(request: Request) -> KeptPrefixes:
    """Tell the prefixes that are kept, the newest first."""
    return await _kept(request)


@router.delete("/{prefix_id:path}", status_code=204)
async def remove_prefix(request: Request, prefix_id: str) -> None:
    """Free a prefix, by its id or its name: what no other prefix or running request needs of it leaves the memory. What
    is in a store stays there (`kvsculpt store rm`).
    """
    if not prefix_id or not any(await _ask(request, "remove_prefix", prefix_id)):
        raise HTTPException(404, "no such prefix")


async def _tokens_of(request: Request, wanted: NewPrefix) -> list[int]:
    """The tokens that later requests will begin with, as vLLM makes them."""
    asked: Any
    if wanted.messages is None:
        assert wanted.prompt is not None  # or the body was refused
        asked = TokenizeCompletionRequest(model=wanted.model, prompt=wanted.prompt)
    else:
        asked = TokenizeChatRequest(
            model=wanted.model,
            messages=wanted.messages,  # type: ignore[arg-type]  # pydantic checks them
            tools=wanted.tools,  # type: ignore[arg-type]
            chat_template_kwargs=wanted.chat_template_kwargs,
            add_generation_prompt=False,
        )
    answer = await request.app.state.serving_tokenization.create_tokenize(asked, request)
    if isinstance(answer, ErrorResponse):
        raise HTTPException(answer.error.code, answer.error.message)
    return answer.tokens


def _adapter(request: Request, wanted: NewPrefix) -> Any:
    """The LoRA adapter that the model's name means; None for the model itself."""
    return request.app.state.openai_serving_models.lora_requests.get(wanted.model)


async def _check_conflicts(request: Request, wanted: NewPrefix) -> None:
    """That the name is free, and that a pin could fit at all, before anything is sculpted for it.

    Raises:
        HTTPException: 409, which says whose name it is, or what is pinned.
    """
    kept = await _kept(request)
    for prefix in kept.prefixes:
        if wanted.name and wanted.name in (prefix.name, prefix.id):
            raise HTTPException(409, f"{prefix.id} has the name {prefix.name!r}: delete it first, or give another")
    if wanted.pin and kept.pinned_blocks >= kept.most_pinned_blocks:
        raise HTTPException(409, f"there is no room for another pin: {await _pins(request)}")


async def _pins(request: Request) -> str:
    kept = await _kept(request)
    pinned = [f"{prefix.name or prefix.id} ({prefix.blocks} blocks)" for prefix in kept.prefixes if prefix.pinned]
    return (
        f"{kept.pinned_blocks} of {kept.most_pinned_blocks} blocks (--kv-compression-pin-blocks) are pinned: "
        f"{', '.join(pinned) or 'nothing'}"
    )


async def _kept(request: Request) -> KeptPrefixes:
    told = await _ask(request, "kept_prefixes")
    monitor = request.app.state.kvsculpt_monitor
    (block_bytes, *_) = await answered(monitor.ask("kv_compression_block_bytes", patience=PATIENCE_SECONDS))
    prefixes = [
        KeptPrefix(bytes=prefix["blocks"] * block_bytes, **prefix) for engine in told for prefix in engine["prefixes"]
    ]
    return KeptPrefixes(
        pinned_blocks=sum(engine["pinned_blocks"] for engine in told),
        most_pinned_blocks=sum(engine["most_pinned_blocks"] for engine in told),
        prefixes=sorted(prefixes, key=lambda prefix: prefix.age_seconds),
    )


async def _ask(request: Request, question: str, *args: Any) -> list[Any]:
    """What every engine's scheduler answers."""
    client = request.app.state.kvsculpt_monitor.client
    return await answered(asyncio.wait_for(ask_schedulers(client, question, *args), PATIENCE_SECONDS))
