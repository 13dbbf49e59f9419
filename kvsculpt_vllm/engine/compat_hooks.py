"""What the start-up hooks need of vLLM's and argparse's private attributes."""

import argparse
from typing import Any


def find_option(parser: argparse.ArgumentParser, option: str) -> argparse.Action:
    """The parser's action of an option such as `--additional-config`.

    argparse has no public way to find an action. Goes once vLLM lets a plugin add flags.
    """
    return parser._option_string_actions[option]


def is_extra_api_server(args: Any) -> bool:
    """Whether these engine arguments are those of one of several API servers, whose parent has made the same
    configuration before. Goes once vLLM's configuration says so publicly.
    """
    return args._api_process_count > 1 and args._api_process_rank >= 0
