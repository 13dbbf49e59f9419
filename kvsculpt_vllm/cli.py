"""The command line ``kvsculpt``. Commands import what is heavy when they run, so that ``--help`` is quick."""

from typing import Annotated

import typer

from kvsculpt_vllm import models

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """Tools around vLLM with sculpted KV caches."""


@app.command()
def model(name: Annotated[str, typer.Argument(help=f"One of: {', '.join(models.MODELS)}.")]) -> None:
    """Print the directory of a small real model, downloading and converting it the first time."""
    if name not in models.MODELS:
        raise typer.BadParameter(f"unknown model '{name}'; known: {', '.join(models.MODELS)}", param_hint="NAME")
    try:
        directory = models.prepare(name)
    except models.ModelError as error:
        typer.echo(f"kvsculpt model: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(directory)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="kvsculpt")
