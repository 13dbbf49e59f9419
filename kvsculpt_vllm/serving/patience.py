"""How long HTTP routes wait for an engine, which answers between two steps, and what they say when it does not."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from fastapi import HTTPException
from vllm.v1.engine.exceptions import EngineDeadError

SHORT_SECONDS, PATIENCE_SECONDS = 1.0, 10.0
"""How long a question waits for an engine that is in a long step: for news, and where nothing is known otherwise."""

Answer = TypeVar("Answer")


async def answered(question: Awaitable[Answer]) -> Answer:
    """The answer, or the HTTP error that says why there is none."""
    try:
        return await question
    except TimeoutError:
        raise HTTPException(503, "the engine is in a long step and has not answered in time: try again") from None
    except EngineDeadError:
        raise HTTPException(503, "the engine has stopped") from None
