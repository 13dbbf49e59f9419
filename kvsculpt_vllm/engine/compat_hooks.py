"""What the start-up hooks need of vLLM's and argparse's private attributes."""

import argparse


def find_option(parser: argparse.ArgumentParser, option: str) -> argparse.Action:
    """The parser's action of an option such as `--additional-config`.

    argparse has no public way to find an action. Goes once vLLM lets a plugin add flags.
    """
    return parser._option_string_actions[option]
