"""Asks the engines for their books, without ever making a scrape wait for a long step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.engine.exceptions import EngineDeadError

from kvsculpt_vllm.engine.compat.frontend import ask_engines

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

NEWEST = 64
"""Requests of which an engine tells what became of them."""


class Monitor:
    """The newest totals, and the newest requests, of every engine that this API server talks to."""

    def __init__(self, client: AsyncLLM) -> None:
        self.client = client
        self.stats: list[dict[str, Any]] = []  # one entry an engine; empty until the first answer
        self.newest: list[dict[str, Any]] = []  # of all engines, the newest first
        self.heard_at: float | None = None  # time.monotonic()
        self._asking: asyncio.Task[None] | None = None

    async def refresh(self, patience: float) -> None:
        """Ask for news, and wait for them for at most `patience` seconds.

        An engine answers between two steps, and one that compresses can take seconds: what was known before is what
        there is then. However many ask at once, an engine is asked once.

        Raises:
            EngineDeadError: the engine has stopped.
        """
        if self.client.errored:
            raise EngineDeadError
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        done, _ = await asyncio.wait({self._asking}, timeout=patience)
        for task in done:
            task.result()

    @property
    def age(self) -> float | None:
        """Seconds since the totals were heard; None if they never were."""
        return None if self.heard_at is None else time.monotonic() - self.heard_at

    async def ask(self, method: str, *args: Any, patience: float) -> Sequence[Any]:
        """What the first worker of every engine answers.

        Raises:
            TimeoutError: an engine is in a step that takes longer than `patience`.
            EngineDeadError: the engine has stopped.
        """
        if self.client.errored:
            raise EngineDeadError
        return await asyncio.wait_for(ask_engines(self.client, method, args), patience)

    async def _ask(self) -> None:
        reports = await ask_engines(self.client, "kv_compression_report", (NEWEST,))
        self.stats = [report["stats"] for report in reports]
        stories = [story for report in reports for story in report["newest"]]
        self.newest = sorted(stories, key=lambda story: -story["time"])[:NEWEST]
        self.heard_at = time.monotonic()


def totals_of_all(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The totals of all engines as one: numbers add up, bounds of histograms are the same everywhere."""
    if not stats:
        return {}
    return _add(list(stats))


def _add(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {
            key: first[key] if key == "bounds" else _add([value[key] for value in values if key in value])
            for key in keys
        }
    if isinstance(first, list):
        return [sum(column) for column in zip(*values, strict=True)]
    return sum(values)
