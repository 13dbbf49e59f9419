"""`kvsculpt precompute`: sculpt documents and system prompts into a store, before any server has seen them.

It runs vLLM's engine with the flags of the server to come, so that what it stores is what that server would.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from kvsculpt_vllm.engine.shared.prefix_wish import Wish, granted
from kvsculpt_vllm.engine.shared.reasons import MEANINGS

FLUSH_SECONDS = 600.0
"""How long what was made may take to get into the store."""

console = Console(stderr=True)


class WrongInput(ValueError):
    """A file that cannot be precomputed: which one, which line, and why."""


@dataclass(frozen=True)
class Wanted:
    """The beginning of prompts to come."""

    name: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Precomputed:
    """What became of one."""

    name: str
    tokens: int
    sculpted: int  # tokens for which segments were made now
    found: int  # for which there were some in the store
    entries: int  # mean over layers and KV heads
    bytes: int
    held_out_error: float
    seconds: float
    reason: str  # why there is none; else empty


def read_wanted(files: list[Path]) -> list[Wanted]:
    """What files ask for: a .jsonl one has a list of chat messages, or an object with `messages`, on each line, as the
    API takes them; any other is one text.

    Raises:
        WrongInput: a file is not there, is empty, or a line of it is something else.
    """
    wanted: list[Wanted] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WrongInput(f"{file}: {error}") from None
        if not text.strip():
            raise WrongInput(f"{file}: it is empty")
        wanted += _lines(file, text) if file.suffix == ".jsonl" else [Wanted(file.name, text=text)]
    return wanted


def _lines(file: Path, text: str) -> Iterator[Wanted]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file.name}:{number}"
        try:
            given = json.loads(line)
        except ValueError as error:
            raise WrongInput(f"{where}: not JSON: {error}") from None
        if isinstance(given, list):
            given = {"messages": given}
        if not isinstance(given, dict) or (unknown := given.keys() - {"messages", "tools", "name"}):
            told = f"unknown keys {', '.join(sorted(unknown))}" if isinstance(given, dict) else type(given).__name__
            raise WrongInput(f"{where}: {told}; allowed: a list of messages, or an object with messages, tools, name")
        messages = given.get("messages")
        if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
            raise WrongInput(f"{where}: messages must be a list of objects with a role")
        tools, name = given.get("tools"), given.get("name")
        if tools is not None and not isinstance(tools, list):
            raise WrongInput(f"{where}: tools must be a list, as the API takes them")
        if name is not None and not isinstance(name, str):
            raise WrongInput(f"{where}: name must be a text")
        yield Wanted(name or where, messages=messages, tools=tools)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


class Sculptor:
    """An engine like that of the server to come, with a store to write to."""

    def __init__(self, model: str, store: str, effort: str, flags: list[str]) -> None:
        """`flags` are those of the server to come. Where it only reads its store, or makes segments with less effort,
        ours count: they come last.

        Raises:
            SystemExit: a flag is wrong; vLLM's parser has said which.
        """
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        load_general_plugins()
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="kvsculpt precompute … --"))
        ours = ["--model", model, "--kv-compression-store", store, "--kv-compression-store-mode", "readwrite"]
        ours += ["--kv-compression-effort", effort, "--kv-compression-max-effort", "thorough"]
        args = parser.parse_args(["--kv-compression", "sculpt", *flags, *ours])
        self._llm = LLM.from_engine_args(EngineArgs.from_cli_args(args))
        (self._block_bytes, *_) = self._llm.collective_rpc("kv_compression_block_bytes")
        self._block_size = self._llm.llm_engine.vllm_config.cache_config.block_size
        self._count = 0

    def sculpt(self, wanted: Wanted) -> Precomputed:
        """Make the segments of one prefix that are not in the store yet.

        Raises:
            ValueError: it is too long, or its chat template does not take its messages.
        """
        wish = Wish(f"precomputed-{self._count}", wanted.name)
        self._count += 1
        begin = time.perf_counter()
        with granted(wish) as params:
            if wanted.messages is None:
                (output,) = self._llm.generate([wanted.text or ""], params, use_tqdm=False)
            else:
                messages: Any = wanted.messages
                (output,) = self._llm.chat(
                    messages, params, use_tqdm=False, add_generation_prompt=False, tools=wanted.tools
                )
        story = (output.kv_transfer_params or {}).get("kv_compression") or {}
        entries = story.get("entries_held", 0)
        return Precomputed(
            name=wanted.name,
            tokens=len(output.prompt_token_ids or ()),
            sculpted=story.get("tokens_sculpted", 0),
            found=story.get("tokens_found", 0),
            entries=entries,
            bytes=entries // self._block_size * self._block_bytes,
            held_out_error=story.get("held_out_error", 0.0),
            seconds=time.perf_counter() - begin,
            # Also where the first segments were made and a later one was not, or by selection: that is not stored.
            reason=story.get("reason", "not told") if story.get("outcome") != "found" else "",
        )

    def finish(self) -> bool:
        """Wait until all is in the store; returns whether it is."""
        return all(self._llm.collective_rpc("kv_compression_flush", args=(FLUSH_SECONDS,)))


def show(rows: list[Precomputed]) -> Table:
    """The table of what was made."""
    table = Table(
        Column("prefix", overflow="fold"), "tokens", "sculpted", "found", "entries", "MiB", "error", "seconds", ""
    )
    for row in rows:
        table.add_row(
            row.name,
            f"{row.tokens:,}",
            f"{row.sculpted:,}",
            f"{row.found:,}",
            f"{row.entries:,}",
            f"{row.bytes / 2**20:.1f}",
            f"{row.held_out_error:.4f}" if row.entries else "",
            f"{row.seconds:.1f}",
            MEANINGS.get(row.reason, row.reason),
        )
    return table


def precompute(
    model: str, store: str, effort: str, files: list[Path], flags: list[str], report: Path | None = None
) -> int:
    """Sculpt all that files ask for into a store. Returns the exit code: 1 where something was not stored.

    Raises:
        WrongInput: a file cannot be read. Nothing was started then.
    """
    wanted = read_wanted(files)
    sculptor, rows = Sculptor(model, store, effort, flags), []
    with Progress(console=console) as progress:
        task = progress.add_task("sculpting", total=len(wanted))
        for one in wanted:
            progress.update(task, description=one.name)
            try:
                rows.append(sculptor.sculpt(one))
            except ValueError as error:
                rows.append(Precomputed(one.name, 0, 0, 0, 0, 0, 0.0, 0.0, str(error)))
            progress.advance(task)
        progress.update(task, description="writing to the store")
        stored = sculptor.finish()
    console.print(show(rows))
    if report is not None:
        report.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if not stored:
        console.print("[red]Not all of it is in the store: the log says why.[/red]")
    return int(not stored or any(row.reason for row in rows))
