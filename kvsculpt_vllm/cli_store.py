"""`kvsculpt store`: what is in a store, whether it is whole, and what should go."""

from __future__ import annotations

import json as json_format
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kvsculpt_vllm.store.store import Store, StoredEntry

app = typer.Typer(no_args_is_help=True, help="Look into a store of segments, check it, remove what should go.")

Url = Annotated[str, typer.Argument(metavar="URL", help="A directory, or a URL of fsspec such as s3://bucket/folder.")]
KEY_DIGITS = 12  # of a key that are shown: enough to name it


@app.command("ls")
def ls(
    url: Url,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """List the segments, those used longest ago first: they go first when the store is full.

    segment: the beginning of its key. tokens: that it stands for. blocks: that it takes in the KV cache. error: held
    out. ranks: the number of files. A segment that misses some is not used, and goes after an hour.
    """
    from rich.console import Console
    from rich.table import Table

    entries = _entries(_open(url, "ls"), "ls")
    if json:
        typer.echo(json_format.dumps([_told(entry) for entry in entries], indent=1))
        return
    table = Table("segment", "behind", *("tokens", "blocks"), "effort", "error", "ranks", "MB", "used, hours ago")
    now = time.time()
    for entry in entries:
        name = entry.name
        table.add_row(
            name.key.hex()[:KEY_DIGITS],
            name.parent.hex()[:KEY_DIGITS],
            f"{name.tokens:,}",
            f"{name.blocks:,}",
            name.effort,
            f"{name.error:.4f}",
            f"{entry.ranks}" if entry.complete else f"{len(entry.files)} of {entry.ranks}",
            f"{entry.size / 1e6:,.1f}",
            f"{(now - entry.used) / 3600:.1f}",
        )
    console = Console()
    if entries:
        console.print(table)
    console.print(f"{len(entries)} segments, {sum(entry.size for entry in entries) / 1e6:,.1f} MB", highlight=False)


@app.command()
def show(
    url: Url, key: Annotated[str, typer.Argument(metavar="KEY", help="A segment's key, or how it begins.")]
) -> None:
    """Print all that is known of one segment as JSON, with what its files say about themselves."""
    from kvsculpt_vllm.store.unusable import Unusable

    store = _open(url, "show")
    makes = []
    for entry in _chosen(_entries(store, "show"), [key]):
        about: dict[str, Any] = {}
        for rank, file in sorted(entry.files.items()):
            with _failing("show"):
                try:
                    about[file.path] = store.read_about(entry.name, rank, entry.ranks)
                except Unusable as error:
                    about[file.path] = {"unusable": error.reason.value, "because": str(error)}
        makes.append({**_told(entry), "files": about})
    typer.echo(json_format.dumps(makes, indent=1))


@app.command()
def verify(url: Url) -> None:
    """Read every file and say which cannot be used, and why. The exit code is 1 if there is one.

    Nothing is changed, and no segment counts as used for it. `kvsculpt store rm` removes what is unusable.
    """
    from kvsculpt_vllm.store.unusable import Reason, Unusable

    store, unusable, whole, gone = _open(url, "verify"), 0, 0, 0
    for entry in _entries(store, "verify"):
        for rank in sorted(entry.files):
            with _failing("verify"):
                try:
                    store.read(entry.name, rank, entry.ranks)
                    whole += 1
                except Unusable as error:
                    if error.reason == Reason.GONE:  # a server has replaced or swept it meanwhile
                        gone += 1
                        continue
                    unusable += 1
                    typer.echo(f"{error.reason.value}: {error}")
    removed = f", {gone} removed meanwhile" if gone else ""
    typer.echo(f"{whole} files are whole, {unusable} unusable{removed}")
    raise typer.Exit(1 if unusable else 0)


@app.command("rm")
def rm(
    url: Url,
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY", help="Keys, or how they begin.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All segments.")] = False,
    older_than: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0, help="Segments that were last used so long ago; in a bucket, written."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove segments, in all their makes. Servers that run go on: they compute what they do not find."""
    if [bool(keys), everything, older_than is not None].count(True) != 1:
        raise typer.BadParameter("name either segments, or --all, or --older-than", param_hint="KEY")
    store = _open(url, "rm", writable=True)
    entries = _entries(store, "rm")
    if keys:
        entries = _chosen(entries, keys)
    elif older_than is not None:
        entries = [entry for entry in entries if entry.used <= time.time() - older_than * 86400]
    size = sum(entry.size for entry in entries) / 1e6
    if entries and not yes:
        typer.confirm(f"Remove {len(entries)} segments, {size:,.1f} MB, from {store.url}?", abort=True)
    with _failing("rm"):
        for entry in entries:
            store.remove(entry.name)
    typer.echo(f"removed {len(entries)} segments, {size:,.1f} MB")


def _open(url: str, command: str, writable: bool = False) -> Store:
    from kvsculpt_vllm.store.store import Store

    try:
        store = Store(url, None, writable)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="URL") from error
    with _failing(command):
        # Also before something is removed: a directory that is not there must not be made for it.
        Store(url, None, False).check()
    return store


def _entries(store: Store, command: str) -> list[StoredEntry]:
    with _failing(command):
        return store.entries()


@contextmanager
def _failing(command: str) -> Iterator[None]:
    """What the file system does not do ends the command with its error."""
    try:
        yield
    except (OSError, ValueError) as error:
        typer.echo(f"kvsculpt store {command}: {error}", err=True)
        raise typer.Exit(1) from error


def _chosen(entries: list[StoredEntry], keys: list[str]) -> list[StoredEntry]:
    """All makes of the segments whose keys begin so, each beginning meaning one."""
    chosen: list[StoredEntry] = []
    for beginning in keys:
        if re.fullmatch("[0-9a-f]{1,64}", beginning) is None:
            raise typer.BadParameter(f"'{beginning}' is no key: keys are written in 0-9 and a-f", param_hint="KEY")
        matching = [entry for entry in entries if entry.name.key.hex().startswith(beginning)]
        found = len({entry.name.key for entry in matching})
        if found != 1:
            which = "no key begins" if not found else f"{found} keys begin"
            raise typer.BadParameter(f"{which} with '{beginning}'", param_hint="KEY")
        chosen += [entry for entry in matching if entry not in chosen]
    return chosen


def _told(entry: StoredEntry) -> dict[str, Any]:
    name = entry.name
    return {
        "key": name.key.hex(),
        "parent": name.parent.hex(),
        "tokens": name.tokens,
        "blocks": name.blocks,
        "effort": name.effort,
        "error": name.error,
        "made": name.made,
        "ranks": entry.ranks,
        "complete": entry.complete,
        "bytes": entry.size,
        "used": entry.used,
    }
