"""The command line `kvsculpt selftest`."""

import json as json_format
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ("LBHNC", "BLHNC")

NOTHING = (
    "there is nothing to test: no CUDA device is here, and on a CPU the kernels' torch twins run. With "
    "TRITON_INTERPRET=1 the kernels run in Triton's interpreter, which takes small shapes"
)

Number = typer.Option(min=1, show_default=False)


def selftest(
    model: Annotated[
        Path | None, typer.Option(help="A model's directory, whose config.json says the numbers that are not given.")
    ] = None,
    layers: Annotated[int | None, Number] = None,
    heads: Annotated[int | None, typer.Option(min=1, show_default=False, help="Query heads of one rank.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, show_default=False, help="KV heads of one rank.")] = None,
    head_size: Annotated[int | None, Number] = None,
    block_size: Annotated[int, typer.Option(min=1)] = 16,
    dtype: Annotated[str | None, typer.Option(show_default=False, help=f"One of: {', '.join(DTYPES)}.")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="A KV cache in FP8, as with --kv-cache-dtype fp8.")] = False,
    layout: Annotated[str, typer.Option(help=f"Of the KV cache: {' or '.join(LAYOUTS)}.")] = LAYOUTS[0],
    json: Annotated[bool, typer.Option("--json", help="Print everything that was compared as JSON.")] = False,
) -> None:
    """Compare the kernels on this device with their twins, with vLLM's and with float64, as a server does at start-up.

    No engine is started: the cache is a small one with the numbers of a model (those of Llama 3.1 8B, with four layers,
    if nothing else is said). The exit code is 0 if everything agrees, 1 if something does not, and 2 where there is
    nothing to test.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported: its start-up would drown the rest
    import torch
    import triton

    interpreted = triton.knobs.runtime.interpret
    if not interpreted and not torch.cuda.is_available():
        typer.echo(f"kvsculpt selftest: {NOTHING}", err=True)
        raise typer.Exit(2)
    if layout not in LAYOUTS:
        raise typer.BadParameter(f"got {layout}, allowed: {', '.join(LAYOUTS)}", param_hint="--layout")
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"got {dtype}, allowed: {', '.join(DTYPES)}", param_hint="--dtype")
    from kvsculpt_vllm.engine.worker.selftest.own_cache import Numbers, subject_of
    from kvsculpt_vllm.engine.worker.selftest.run import Report, self_test, told

    try:
        numbers = Numbers(4, 32, 8, 128, torch.bfloat16) if model is None else Numbers.of_model(model)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    given: dict[str, Any] = {"layers": layers, "query_heads": heads, "kv_heads": kv_heads, "head_size": head_size}
    given["dtype"] = dtype and getattr(torch, dtype)
    given["cache_dtype"] = torch.float8_e4m3fn if fp8 else None
    numbers = replace(numbers, **{name: number for name, number in given.items() if number is not None})
    if numbers.query_heads % numbers.kv_heads:
        raise typer.BadParameter(f"{numbers.query_heads} are no multiple of {numbers.kv_heads}", param_hint="--heads")
    report: Report = self_test(subject_of(numbers, block_size, layout, torch.device("cpu" if interpreted else "cuda")))
    if json:
        typer.echo(json_format.dumps(report.as_json(), indent=1))
    else:
        typer.echo(f"on: {told(report.machine)}")
        typer.echo(f"of: {told(report.subject)}")
        for kernel, worst in report.worst().items():
            typer.echo(f"{'ok ' if worst.good else 'BAD'} {kernel}: {worst.told()}")
        for why in report.left_out:
            typer.echo(f"    left out: {why}")
        typer.echo(f"{len(report.measured)} comparisons, {len(report.failures)} failed, in {report.seconds:.1f} s")
    raise typer.Exit(1 if report.failures else 0)
