"""The endpoint plugin: `GET /kv_compression` says what was compressed. Loaded if VLLM_PLUGINS names kvsculpt."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from pydantic import BaseModel
from starlette.datastructures import State

from kvsculpt_vllm.config import CompressionConfig

router = APIRouter()


class CompressionReport(BaseModel):
    """What one server did since its start."""

    active: bool
    settings: dict[str, Any]
    totals: dict[str, float]  # compressions, blocks_freed, bytes_freed, seconds, failures, kept_exact (too much lost)
    requests: list[dict[str, Any]]  # the newest compressions, oldest first: see engine/compressor.py


@router.get("/kv_compression")
async def kv_compression(request: Request) -> CompressionReport:
    """Settings, totals and the newest compressions, as the first rank sees them."""
    state = request.app.state
    config = CompressionConfig.from_additional_config(state.kvsculpt_engine.vllm_config.additional_config)
    report = {"totals": {}, "requests": []}
    if config.active:
        if state.kvsculpt_engine.errored:
            raise HTTPException(503, "the engine has stopped")
        report = (await state.kvsculpt_engine.collective_rpc("kv_compression_report"))[0]
    return CompressionReport(active=config.active, settings=config.model_dump(), **report)


class SculptEndpoints:
    """vLLM's `EndpointPlugin` protocol."""

    name = "kvsculpt"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Keep the engine client for the routes."""
        state.kvsculpt_engine = engine_client


def create_plugin() -> SculptEndpoints:
    """The entry point of `vllm.endpoint_plugins`."""
    return SculptEndpoints()
