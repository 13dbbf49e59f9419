"""Our HTTP routes: what was compressed, as JSON and as a page, and our share of `/metrics`."""

from __future__ import annotations

import base64
import hashlib
import math
import secrets
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State
from vllm import envs
from vllm.logger import init_logger

from kvsculpt_vllm.engine.shared.capacity import blocks_of_engine, server_settings
from kvsculpt_vllm.serving import prefixes
from kvsculpt_vllm.serving.metrics import text_of
from kvsculpt_vllm.serving.monitor import NEWEST, Monitor, totals_of_all
from kvsculpt_vllm.serving.patience import PATIENCE_SECONDS, SHORT_SECONDS, answered
from kvsculpt_vllm.store.places import shown

logger = init_logger("vllm.kvsculpt")

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


class Stats(BaseModel):
    """What this server's engines did since their start. See engine/shared/ledger.py for the meaning of the numbers."""

    settings: dict[str, Any]
    age_seconds: float  # since when the numbers are: an engine answers between two steps
    requests: dict[str, dict[str, int]]  # outcome -> reason -> requests
    deferred: dict[str, int]
    span_tokens: int
    entries_kept: int
    blocks_freed: int
    bytes_freed: int
    solver_steps: int
    segments: int  # made
    remade: int
    found: dict[str, int]
    store: dict[str, Any]  # what became of its files; empty without one
    seconds: dict[str, Any]
    held_out_error: dict[str, Any]
    pool: dict[str, int]


class Unauthorized(Exception):
    """Becomes an HTTP 401. vLLM's own handler of `HTTPException` drops headers, and a browser needs this one to ask."""

    @staticmethod
    def answer(request: Request, error: Exception) -> Response:
        """Answer in the words of vLLM's own middleware."""
        return JSONResponse({"error": "Unauthorized"}, 401, {"WWW-Authenticate": 'Basic realm="kvsculpt"'})


def _require_key(request: Request) -> None:
    """The server's API key, as for vLLM's own API: as a bearer token, or as the password that a browser asks for.

    Raises:
        Unauthorized: neither is there.
    """
    keys = request.app.state.kvsculpt_keys
    if not keys:
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except ValueError:
            given = ""
    elif scheme.lower() != "bearer":
        given = ""
    digest = hashlib.sha256(given.encode()).digest()
    # Summed and not stopped at the first, so that the time tells nothing.
    if not sum(secrets.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys):
        raise Unauthorized


router = APIRouter(prefix="/kvsculpt", dependencies=[Depends(_require_key)])
router.include_router(prefixes.router)


def _monitor(request: Request) -> Monitor:
    return request.app.state.kvsculpt_monitor


async def _refreshed(request: Request) -> Monitor:
    """What is known after a short wait for news; a longer one where nothing is known."""
    monitor = _monitor(request)
    for patience in (SHORT_SECONDS, PATIENCE_SECONDS):
        await answered(monitor.refresh(patience))
        if monitor.age is not None:
            return monitor
    raise HTTPException(503, "the engine is in a long step and has not answered yet: try again")


@router.get("/stats")
async def stats(request: Request) -> Stats:
    """Settings, totals since start and the block pool as it is now, of all engines together."""
    monitor = await _refreshed(request)
    config = server_settings(monitor.client.vllm_config, blocks_of_engine(monitor.client.vllm_config))
    assert monitor.age is not None  # or `_refreshed` had raised
    settings = config.model_dump() | {"store": shown(config.store)}
    return Stats(settings=settings, age_seconds=monitor.age, **totals_of_all(monitor.stats))


@router.get("/requests")
async def newest_requests(request: Request, limit: int = Query(NEWEST, ge=1, le=NEWEST)) -> list[dict[str, Any]]:
    """What became of the newest requests, the newest first; as old as `/kvsculpt/stats` says."""
    return (await _refreshed(request)).newest[:limit]


@router.get("/requests/{request_id:path}")
async def one_request(request: Request, request_id: str) -> dict[str, Any]:
    """What became of one request, by the id in its answer; with budgets and errors by head."""
    stories = await answered(_monitor(request).ask("kv_compression_request", request_id, patience=PATIENCE_SECONDS))
    found = [story for story in stories if story is not None]
    if not found:
        raise HTTPException(404, "no such request among the newest ones whose prompt was computed")
    return max(found, key=lambda story: story["time"])


@router.get("", include_in_schema=False)
async def page() -> HTMLResponse:
    """The dashboard. It loads nothing from elsewhere, and its policy says so."""
    digest = {tag: _digest_of(tag) for tag in ("script", "style")}
    policy = f"default-src 'none'; connect-src 'self'; script-src {digest['script']}; style-src {digest['style']}"
    return HTMLResponse(
        PAGE,
        headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"},
    )


def _digest_of(tag: str) -> str:
    """A Content-Security-Policy source for the page's one inline element `tag`."""
    content = PAGE.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


class SculptEndpoints:
    """Our routes, as vLLM's protocol `EndpointPlugin` wants them."""

    name = "kvsculpt"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes, and our metrics to those that `/metrics` shows."""
        app.include_router(router)
        app.add_exception_handler(Unauthorized, Unauthorized.answer)
        stock = next((r for r in app.routes if isinstance(r, APIRoute) and r.path == "/metrics"), None)
        if stock is not None:
            # vLLM puts a plugin's route in the place of its own one of the same path.
            app.get("/metrics", include_in_schema=False)(_with_ours(stock.endpoint))

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Keep what the routes need."""
        state.kvsculpt_monitor = Monitor(engine_client)
        # Several servers hear at different times. What one scrape tells must not be older than what another server told
        # before: a counter that falls looks like a restart.
        several = (getattr(args, "api_server_count", None) or 1) > 1
        state.kvsculpt_oldest_seconds = SHORT_SECONDS if several else math.inf
        # As vLLM reads them: the flag comes before the variable.
        state.kvsculpt_keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


def _with_ours(stock: Callable[[Request], Response]) -> Callable:
    async def metrics(request: Request) -> Response:
        """vLLM's metrics, then ours."""
        monitor = _monitor(request)
        try:
            await monitor.refresh(SHORT_SECONDS)
        except Exception as error:  # noqa: BLE001 - vLLM's own metrics are needed most when something is wrong
            logger.warning("kvsculpt: no new numbers for /metrics: %s: %s", type(error).__name__, error)
        response = await run_in_threadpool(stock, request)
        return Response(
            bytes(response.body) + text_of(monitor, request.app.state.kvsculpt_oldest_seconds),
            response.status_code,
            media_type=None,
            headers={"Content-Type": response.headers["Content-Type"]},
        )

    return metrics
