"""`kvsculpt doctor`: what is installed, what would be refused, and whether the solver and a running server work."""

from __future__ import annotations

import json
import os
import platform
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any, NamedTuple

import torch

import kvsculpt_vllm
from kvsculpt_vllm.plugin import UnsupportedVLLM, check_vllm_version
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import compress
from kvsculpt_vllm.sculpt.effort import Effort
from kvsculpt_vllm.sculpt.problem import Problems

HTTP_SECONDS = 30


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    good: bool | None  # None: there is nothing to be good or bad about
    detail: str


class Trouble(Exception):
    """A check that found something wrong; the message says what and what to do."""


def examine(model: str | None, url: str | None, api_key: str | None, flags: Sequence[str] = ()) -> Iterator[Finding]:
    """Every check, one after the other; a check that fails does not end the others.

    Args:
        flags: those of `vllm serve` that the model would be served with.
    """
    yield Finding("versions", None, ", ".join(_versions()))
    checks: list[tuple[str, Callable[[], str]]] = [
        ("vLLM's version", _vllm_version),
        ("plugin discovered", _discovered),
        ("flags", _flags),
        ("device", _device),
        ("environment", _environment),
        ("self-test", _self_test),
    ]
    if model is not None:
        checks.insert(-1, (f"model {model}", lambda: judge(model, flags)))
    if url is not None:
        checks.append((f"server {url}", lambda: _server(url.rstrip("/"), api_key)))
    for name, check in checks:
        try:
            yield Finding(name, True, check())
        except Trouble as trouble:
            yield Finding(name, False, str(trouble))
        except Exception as error:  # noqa: BLE001 - what nobody thought of is a finding, too
            yield Finding(name, False, f"the check itself failed: {type(error).__name__}: {error}")


def judge(model: str, flags: Sequence[str] = ()) -> str:
    """What is chosen for a model that a server would compress; of its directory config.json is enough.

    Args:
        flags: those of `vllm serve` that it would be served with.

    Raises:
        Trouble: it would be refused, for which reasons, or cannot be configured or tried.
        SystemExit: a flag is wrong; vLLM's parser has said which.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kvsculpt_vllm.calibration_file import NONE
    from kvsculpt_vllm.config import CompressionConfig
    from kvsculpt_vllm.engine.compat.patcher import is_applied
    from kvsculpt_vllm.engine.compat.patches import ADD_CLI_ARGS
    from kvsculpt_vllm.engine.startup.refusals.refusal import UnsupportedFeature

    if not is_applied(ADD_CLI_ARGS):
        raise Trouble("not checked, because the plugin was not loaded")
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="kvsculpt doctor … --"))
    given = parser.parse_args(["--kv-compression", "sculpt", *flags, "--model", model])
    args = EngineArgs.from_cli_args(given)
    args.load_format, args.enforce_eager = "dummy", True
    args.kv_cache_memory_bytes = args.kv_cache_memory_bytes or 1 << 28  # else it is measured
    try:
        config = args.create_engine_config()
        layers = _rehearsed(_plain(args, config))
    except UnsupportedFeature as refused:
        raise Trouble(_reasons(refused)) from None
    except (ValueError, OSError) as error:
        raise Trouble(f"vLLM cannot configure it: {error}") from None
    calibration = CompressionConfig.from_additional_config(config.additional_config).calibration
    if calibration == NONE:
        calibration = "none (a pilot on each prompt, which `kvsculpt calibrate --model DIR` can save)"
    return f"not refused, {layers} layers tried, block size {config.cache_config.block_size}, calibration {calibration}"


def refusals() -> list[tuple[str, str, str]]:
    """What --kv-compression is refused with, why, and the cure."""
    from kvsculpt_vllm.engine.startup.refusals.configuration import known_refusals

    return [(refusal.feature, refusal.cause, refusal.cure) for refusal in known_refusals()]


def _versions() -> Iterator[str]:
    yield f"kvsculpt-vllm {kvsculpt_vllm.__version__}"
    yield f"Python {platform.python_version()}"
    for package in ("vllm", "torch", "triton", "transformers", "fastapi"):
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} not installed"


def _vllm_version() -> str:
    try:
        check_vllm_version()
    except UnsupportedVLLM as error:
        raise Trouble(str(error)) from None
    return "supported"


def _discovered() -> str:
    found = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "kvsculpt"]
    if not found:
        raise Trouble("vLLM does not see the plugin: install kvsculpt-vllm into the environment that vLLM is in")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "kvsculpt" not in allowed.split(","):
        raise Trouble(f"VLLM_PLUGINS is {allowed!r}, which leaves it out: unset it, or add kvsculpt to it")
    return f"{found[0].value}, loaded in every vLLM process"


def _flags() -> str:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kvsculpt_vllm.engine.compat.frontend import find_option

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())  # loads the plugins, as `vllm serve` does
    try:
        find_option(parser, "--kv-compression")
    except KeyError:
        raise Trouble("vllm serve has no --kv-compression: vLLM's log says why the plugin was not loaded") from None
    return "vllm serve has --kv-compression"


def _device() -> str:
    from vllm.platforms import current_platform

    from kvsculpt_vllm.engine.startup.refusals.device import check_platform
    from kvsculpt_vllm.engine.startup.refusals.refusal import UnsupportedFeature

    try:
        check_platform(current_platform)
    except UnsupportedFeature as refused:
        raise Trouble(_reasons(refused)) from None
    name = current_platform.device_name or "unknown"
    kernels = "torch in place of the Triton kernels"
    if torch.cuda.is_available():
        kernels = "Triton kernels, which `kvsculpt selftest` and every start of a server compare with their twins"
    return f"{name}, {torch.get_num_threads()} threads, {kernels}"


def _environment() -> str:
    from vllm import envs

    from kvsculpt_vllm.engine.startup.refusals.cache import DEFAULT_LAYOUT, LAYOUTS, requested_layout

    layout = requested_layout()
    if layout not in (None, *LAYOUTS):
        raise Trouble(f"VLLM_KV_CACHE_LAYOUT asks for {layout}, refused: set it to {' or '.join(LAYOUTS)}, or unset it")
    if envs.VLLM_USE_RUST_FRONTEND:
        raise Trouble("VLLM_USE_RUST_FRONTEND is set, refused: it runs no Python plugins; unset it")
    return f"KV cache layout {layout or DEFAULT_LAYOUT}, no variable that is refused"


def _plain(args: Any, config: Any) -> Any:
    """The configuration for one rank and for weights that are not quantised, with which attention is the same."""
    alone = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    if config.model_config.quantization is None and all(getattr(args, name) == 1 for name in alone):
        return config
    overrides = args.hf_overrides
    if isinstance(overrides, dict) or overrides is None:  # and no function
        overrides = {**(overrides or {}), "quantization_config": None}
    return replace(args, **alone, hf_overrides=overrides, quantization=None).create_engine_config()


def _rehearsed(config: Any) -> int:
    """How many attention layers the model has, none of which a server would refuse."""
    from kvsculpt_vllm.engine.startup.refusals.refusal import UnsupportedFeature
    from kvsculpt_vllm.engine.worker.rehearsal import rehearse

    try:
        return rehearse(config)
    except UnsupportedFeature:
        raise
    except Exception as error:
        # Whatever a model raises that is built without its weights: its configuration was not refused.
        raise Trouble(
            "its configuration is not refused, and its layers could not be tried without its weights "
            f"({type(error).__name__}: {error}): the start of a server tells"
        ) from error


def _reasons(refused: Any) -> str:
    return "refused: " + "; ".join(map(str, refused.refusals))


def _self_test() -> str:
    """Compress random heads, and judge the result by the formula written out in float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    # Queries look along a few directions, as a model's do: fits to some of them then hold for the others.
    heads, entries, queries, size = 2, 256, 320, 64
    asked = torch.bmm(normal(heads, queries, 12), normal(heads, 12, size)) / 3.5 + 0.2 * normal(heads, queries, size)
    problems = Problems(
        queries=asked,
        keys=normal(heads, entries, size),
        values=normal(heads, entries, size),
        retained_lse=torch.full((heads, queries), -torch.inf, device=device),
        retained_out=torch.zeros(heads, queries, size, device=device),
        held_out=torch.arange(queries) % 5 == 4,
        scale=size**-0.5,
    )
    begin = time.perf_counter()
    effort = Effort(positions=queries, pilot_positions=128, fit_positions=queries, key_steps=5)
    done = compress(problems, PagePlan(32, entries // 32, heads * 2, 0), "sculpt", "adaptive", effort)
    seconds = time.perf_counter() - begin
    for b in range(heads):
        truth, claimed = _loss(problems, done.keys[b], done.values[b], b), float(done.error[b])
        selection = float(done.start_error[b])
        if not (abs(truth - claimed) <= 0.05 * claimed and truth < selection):
            raise Trouble(
                f"head {b} has error {truth:.4f} where the solver says {claimed:.4f} and selection has "
                f"{selection:.4f}: please report this"
            )
    before, after = float(done.start_error.mean()), float(done.error.mean())
    told = f"held-out error {before:.3f} -> {after:.3f}"
    return f"{heads} heads sculpted to a quarter in {seconds:.1f} s on {device}, {told}"


def _loss(problems: Problems, keys: torch.Tensor, values: torch.Tensor, b: int) -> float:
    """Relative squared output error plus squared log-sum-exp error of head b on the held-out queries."""
    asked = problems.queries[b, problems.held_out].double() * problems.scale

    def attend(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = asked @ keys.double().T
        return torch.softmax(logits, -1) @ values.double(), torch.logsumexp(logits, -1)

    (out, lse), (true_out, true_lse) = attend(keys, values), attend(problems.keys[b], problems.values[b])
    output = (out - true_out).square().sum(-1).mean() / true_out.square().sum(-1).mean()
    return float(output + (lse - true_lse).square().mean())


def _server(url: str, api_key: str | None) -> str:
    stats = _get(f"{url}/kvsculpt/stats", api_key)
    settings, requests, pool = stats["settings"], stats["requests"], stats["pool"]
    counts = ", ".join(f"{sum(reasons.values())} {outcome}" for outcome, reasons in requests.items())
    failed = sum(requests["failed"].values())
    told = (
        f"{settings['method']}, keep ratio {settings['keep_ratio']}; requests: {counts}; blocks: {pool['used']} of "
        f"{pool['total']} held, {pool['saved']} saved now"
    )
    if failed:
        raise Trouble(f"{failed} compressions failed ({requests['failed']}), the server's log says why; {told}")
    return told


def _get(address: str, api_key: str | None) -> Any:
    request = urllib.request.Request(address)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=HTTP_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        cures = {
            401: "it wants an API key: give --api-key, or set VLLM_API_KEY",
            404: "it runs without --kv-compression, or without the plugin",
        }
        raise Trouble(f"HTTP {error.code}: {cures.get(error.code, error.reason)}") from None
    except (OSError, ValueError) as error:
        raise Trouble(f"no answer: {error}") from None
