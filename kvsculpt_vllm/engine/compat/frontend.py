"""What API servers need of vLLM's arguments and of its client to the engines, by public names."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

ASK_SCHEDULER = "kv_compression_ask_scheduler"
"""The method that our scheduler adds to the engine core it is in."""
QUESTIONS = ("kept_prefixes", "remove_prefix")
"""Methods of our scheduler that a front end may call."""

if TYPE_CHECKING:  # the start-up hooks import this file in every vLLM process: it must stay light
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM


def is_extra_api_server(args: EngineArgs) -> bool:
    """Whether these engine arguments are those of one of several API servers, after their parent's.

    Can go when vLLM's configuration says so publicly.
    """
    return args._api_process_count > 1 and args._api_process_rank >= 0


async def ask_engines(client: AsyncLLM, method: str, args: tuple) -> list[Any]:
    """What the first worker of every engine answers to `method`.

    `EngineClient.collective_rpc` answers for the first engine only where there are several (data parallelism). Can go
    when it answers for all.
    """
    call = ("collective_rpc", method, None, args, None)
    return [workers[0] for workers in await client.engine_core.call_utility_all_async(*call)]


async def ask_schedulers(client: AsyncLLM, method: str, *args: Any) -> list[Any]:
    """What the scheduler of every engine answers to one of `QUESTIONS`.

    Can go when `EngineClient` has a public way to.
    """
    # One list: vLLM gives a method no more arguments than it has parameters, of which `*args` would be one.
    return await client.engine_core.call_utility_all_async(ASK_SCHEDULER, method, list(args))


def find_option(parser: argparse.ArgumentParser, option: str) -> argparse.Action:
    """The parser's action of an option such as `--additional-config`. Can go when argparse has a public way."""
    return parser._option_string_actions[option]
