"""The command line ``kvsculpt``. Commands import what is heavy when they run, so that ``--help`` is quick."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from typer.core import TyperCommand

from kvsculpt_vllm import cli_selftest, cli_store, models

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(cli_store.app, name="store")
app.command("selftest")(cli_selftest.selftest)

Model = Annotated[str, typer.Option(help=f"A model's directory, or one of: {', '.join(models.MODELS)}.")]
Seed = Annotated[int, typer.Option(help="Moves the contexts along the text.")]
Device = Annotated[str, typer.Option(help="Where torch computes: cpu, cuda.")]


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


class _SeveralRatios(TyperCommand):
    """Lets ``--keep-ratio 0.1 0.3`` mean ``--keep-ratio 0.1 --keep-ratio 0.3``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spelt_out: list[str] = []
        in_ratios = False
        for arg in args:
            if arg.startswith("-"):
                in_ratios = arg == "--keep-ratio"
            elif in_ratios and spelt_out[-1] != "--keep-ratio":
                spelt_out.append("--keep-ratio")
            spelt_out.append(arg)
        return super().parse_args(ctx, spelt_out)


@app.command("eval", cls=_SeveralRatios)
def evaluate(
    model: Model = "smollm2-135m",
    text: Annotated[
        str,
        typer.Option(
            help="A UTF-8 file, pydoc (the help topics that come with Python), stdlib (its source) or docstrings (its "
            "modules' descriptions)."
        ),
    ] = "pydoc",
    context: Annotated[int, typer.Option(min=1, help="Tokens whose cache is compressed.")] = 2048,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens scored after each context.")] = 256,
    num_contexts: Annotated[int, typer.Option(min=1, help="Contexts, spread evenly over the text.")] = 8,
    keep_ratio: Annotated[
        list[float], typer.Option(help="Fraction of the span's entries that is kept; several may follow.")
    ] = [0.3],  # noqa: B006
    methods: Annotated[
        str,
        typer.Option(
            help="Separated by commas: ours are select, select_fit, sculpt; peers are attention_matching, "
            "attention_matching_omp, attention_matching_our_budgets, expected_attention, keydiff, kvzip, snapkv, "
            "kvsculpt_paper; of a cache in FP8 (keep ratio 1: FP8 alone) are sculpt_hadamard_fp8, sculpt_fp8 and "
            "sculpt_rounded_fp8; random shows how bad it can be."
        ),
    ] = "select,select_fit,sculpt",
    budget: Annotated[
        str, typer.Option(help="Separated by commas: uniform (every head the same), adaptive (by each head's error).")
    ] = "uniform,adaptive",
    tasks: Annotated[
        str,
        typer.Option(
            help="Separated by commas. RULER's (ruler: all of them): niah, niah_noise, niah_uuid, multikey, "
            "multikey_full, multikey_uuid, multivalue, multiquery, tracking, common_words, frequent_words, qa, "
            "qa_two_hops. Several questions of one context: many_questions. A system prompt's rules and secret: "
            "instructions. Facts told some turns ago: conversation. Repeating exactly (copying: all of them): "
            "copy_verbatim, copy_list, copy_code. all is all. Questions are asked, instead of scoring how the text "
            "goes on."
        ),
    ] = "",
    preset: Annotated[
        str, typer.Option(help="What sculpt means: ours, or paper, KVSculpt as published (rows say kvsculpt_paper).")
    ] = "ours",
    effort: Annotated[
        str, typer.Option(help="Queries and steps a fit may take: fast, balanced, thorough.")
    ] = "balanced",
    block_size: Annotated[
        int, typer.Option(min=1, help="Entries in a page, as vLLM's --block-size: spans and budgets are whole pages.")
    ] = 32,
    segment: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Ours compress a context in segments of so many tokens, as a server does with "
            "--kv-compression-segment, whose default it has; 0 means all at once, as peers always do.",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    calibration: Annotated[
        str,
        typer.Option(
            help="What adaptive budgets of sculpt follow: a file of `kvsculpt calibrate`, none (a pilot on each "
            "context), or auto, the file that a server would find."
        ),
    ] = "auto",
    json: Annotated[Path | None, typer.Option(metavar="OUT", help="The file that rows are added to.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder to write index.html and its pictures to.")
    ] = None,
) -> None:
    """Measure what compressing the KV cache changes in a model's answers.

    The model reads a context, its KV cache is compressed by each method, and the text that really follows is then fed
    to it token by token. What it expects next is compared with what it expects from the full cache. Models run in
    transformers in float32, keys and values are rounded to bfloat16 as vLLM stores them; vLLM is not needed. A long
    context is compressed in segments, as in vLLM: each is computed from those before it.

    kept fraction: entries of the cache after compression over those before, exact sink tokens and recent window
    included; the same for all methods of one keep ratio.

    kl mean: mean over all tokens of KL(full || compressed) of the next-token distributions, in nats; 0 is perfect.

    kl median, kl p99: half, and 99 %, of the tokens are below; a few tokens that copy something carry most of the mean.

    top1 agreement: share of tokens for which both caches find the same next token the most likely.

    ppl full, ppl: perplexity of the true text, from the full and from the compressed cache.

    held out error before, after: the fit's own loss (relative squared output error plus squared log-sum-exp error, mean
    over heads) on queries that no fit uses, for attention selection at the same budgets and for the method.

    seconds: mean time to compress one context.

    score, score full (--tasks): share of what was asked for that the model's greedy answer holds (instructions: of the
    instructions that it keeps), from the compressed and from the full cache, mean over the questions. Questions follow
    the compressed context, each its own copy: a method cannot know what will be asked.

    leakage, leakage full (instructions): share of attempts at the system prompt's secret that reveal it, or the prompt.

    heads: of every (layer, KV head), mean over contexts. difficulty: the error that adaptive budgets are given out by,
    at the uniform budget; entries: what its budget keeps, sinks included; error: held-out error after. --report shows
    them as heat maps, and how the solver's loss fell on training and on held-out queries.

    Every (method, budget, keep ratio) becomes one row of the file given by --json, with kl_per_context, the mean KL of
    each context, besides. After an interruption the same command goes on; what is in the file is not measured again,
    unless the code of the algorithm or of this harness has changed since.
    """
    from rich.console import Console

    from kvsculpt_vllm.evaluation.run import Request, run
    from kvsculpt_vllm.evaluation.tasks import expanded

    if preset not in ("ours", "paper"):
        raise typer.BadParameter(f"got {preset}, allowed: ours, paper", param_hint="--preset")
    chosen = ["kvsculpt_paper" if (name, preset) == ("sculpt", "paper") else name for name in _names(methods)]
    request = Request(
        model=model,
        text=text,
        context=context,
        continuation=continuation,
        num_contexts=num_contexts,
        keep_ratios=keep_ratio,
        methods=chosen,
        budgets=_names(budget),
        effort=effort,
        block_size=block_size,
        segment=segment,
        seed=seed,
        device=device,
        tasks=expanded(_names(tasks)),
        calibration=calibration,
    )
    if tasks and report is not None:
        raise typer.BadParameter("shows how the text goes on, so it cannot be had with --tasks", param_hint="--report")
    try:
        run(request, json, Console(), report)
    except (ValueError, OSError, NotImplementedError, models.ModelError) as error:
        typer.echo(f"kvsculpt eval: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def calibrate(
    model: Model = "smollm2-135m",
    text: Annotated[
        list[str],
        typer.Option(
            help="A UTF-8 file like the prompts that will come, pydoc (Python's help topics), stdlib (its source) or "
            "docstrings (its modules' descriptions); several may be given."
        ),
    ] = ["stdlib"],  # noqa: B006
    context: Annotated[
        int, typer.Option(min=1, help="Tokens of a context. Three times as many behind it are read, too.")
    ] = 2048,
    num_contexts: Annotated[int, typer.Option(min=1, help="Contexts of each text, spread evenly over it.")] = 4,
    effort: Annotated[
        str, typer.Option(help="Queries that losses are measured by: fast, balanced, thorough.")
    ] = "balanced",
    second_reading: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Weight of what heads lose where the context is read again, the rest being that of its first reading. "
            "More of it keeps more of what copies.",
        ),
    ] = 0.25,
    ranking: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2,
            help="Rank entries by the attention they accumulate (1) or by its root mean square (2). By default that "
            "with which the answers on these texts lose less.",
        ),
    ] = None,
    losses_of: Annotated[
        Path | None,
        typer.Option(
            help="Take what heads lose from this calibration of the model, and learn only what tells which entries "
            "will be copied, which takes a tenth of the time."
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write; by default the one in the model's directory that servers look for."),
    ] = None,
) -> None:
    """Measure once which layers and heads of a model need many entries, so that no prompt has to.

    A server that finds the file (kvsculpt-calibration.json in the model's directory, or the one that
    --kv-compression-calibration names) gives out adaptive budgets of the method sculpt by it, which saves each prompt's
    pilot. Whether less is lost, too, depends on the model and on how like the prompts the text is: compare
    `kvsculpt eval --calibration FILE` with `--calibration none` before it serves.

    The model is run in transformers in float32.
    """
    from rich.console import Console

    from kvsculpt_vllm.calibration_file import FILE
    from kvsculpt_vllm.evaluation.calibrate import calibrate as measure
    from kvsculpt_vllm.evaluation.model import model_directory
    from kvsculpt_vllm.evaluation.run import calibration_of
    from kvsculpt_vllm.sculpt.effort import EFFORTS

    if effort not in EFFORTS:
        raise typer.BadParameter(f"got {effort}, allowed: {', '.join(EFFORTS)}", param_hint="--effort")
    try:
        directory = model_directory(model)
        known = None if losses_of is None else calibration_of(directory, str(losses_of))
        path = out or directory / FILE
        if path.is_dir() or not os.access(path.parent, os.W_OK):  # before and not after minutes of work
            raise ValueError(f"--out: {path} cannot be written, allowed: a file in a writable directory")
        measured = measure(
            directory,
            text,
            context,
            num_contexts,
            effort,
            second_reading,
            seed,
            device,
            Console(stderr=True),
            cast(Literal[1, 2] | None, ranking),  # typer has looked
            known,
        )
        measured.write(path)
    except (ValueError, OSError, NotImplementedError, models.ModelError) as error:
        typer.echo(f"kvsculpt calibrate: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(path)


class _WithEngineFlags(TyperCommand):
    """Takes what follows ``--`` for flags of ``vllm serve``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ctx.meta["engine_flags"] = args[end + 1 :]
        return super().parse_args(ctx, args[:end])


@app.command(cls=_WithEngineFlags, options_metavar="[OPTIONS] [-- FLAGS OF VLLM SERVE]")
def doctor(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model's directory, of which config.json is enough: would compression be refused for it, as it is "
            "served with the flags behind --?"
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="A running server, such as http://localhost:8000.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", show_envvar=True, help="That server's API key.")
    ] = None,
    refused: Annotated[
        bool, typer.Option("--refusals", help="Also list all that --kv-compression cannot be combined with, and why.")
    ] = False,
) -> None:
    """Say whether compression can work here: versions, plugin, device, refusals, a short self-test, a running server.

    The exit code is 0 if everything is well, and 1 if something is not.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported: its start-up would drown the rest
    from kvsculpt_vllm import doctor as checks

    console, well = Console(soft_wrap=True), True
    for finding in checks.examine(model, url, api_key, ctx.meta["engine_flags"]):
        mark = {True: "[green]ok  [/green]", False: "[red]BAD [/red]", None: "    "}[finding.good]
        console.print(f"{mark} {escape(finding.name)}: {escape(finding.detail)}", highlight=False)
        well = well and finding.good is not False
    if refused:
        table = Table("--kv-compression is refused with", "because", "cure")
        for row in checks.refusals():
            table.add_row(*map(escape, row))
        console.print(table)
    raise typer.Exit(0 if well else 1)


@app.command(cls=_WithEngineFlags, options_metavar="[OPTIONS] [-- FLAGS OF VLLM SERVE]")
def precompute(
    ctx: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…",
            show_default=False,
            help="Texts, one prefix each, or .jsonl files with a list of chat messages on each line.",
        ),
    ],
    store: Annotated[str, typer.Option(help="The server's --kv-compression-store.")],
    model: Model = "smollm2-135m",
    effort: Annotated[
        str, typer.Option(help="How well segments are made: fast, balanced, thorough. Servers of any effort use them.")
    ] = "thorough",
    json: Annotated[Path | None, typer.Option(metavar="OUT", help="A file for what was made of each prefix.")] = None,
) -> None:
    """Sculpt documents and system prompts into a store, before a server is asked about them.

    Requests find them by their tokens: a text as completions begin with it, messages as the chat template renders them.
    Settings that segments depend on (model, data type, keep ratio, budget, sinks, window, block size, parallelism) must
    be those of the servers: give their flags behind --.
    """
    from kvsculpt_vllm.sculpt.effort import EFFORTS

    if effort not in EFFORTS:
        raise typer.BadParameter(f"'{effort}' is none of: {', '.join(EFFORTS)}", param_hint="--effort")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from kvsculpt_vllm.precompute import WrongInput
    from kvsculpt_vllm.precompute import precompute as run

    try:
        code = run(_directory(model), store, effort, files, ctx.meta["engine_flags"], json)
    except WrongInput as error:
        raise typer.BadParameter(str(error), param_hint="FILE…") from None
    except models.ModelError as error:
        typer.echo(f"kvsculpt precompute: {error}", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(code)


def _directory(model: str) -> str:
    """A model as vLLM takes it: one of ours by its directory."""
    return str(models.prepare(model)) if model in models.MODELS else model


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="kvsculpt")
