"""Flags, JSON, YAML and `LLM(...)` arguments become one configuration, and it reaches the engine's."""

import json
from types import SimpleNamespace

import pytest
import torch
import vllm.engine.arg_utils as arg_utils
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kvsculpt_vllm.config import CompressionConfig, ConfigError
from kvsculpt_vllm.engine.startup import hooks, request_checks
from kvsculpt_vllm.plugin import register

HALF = CompressionConfig(method="sculpt", keep_ratio=0.5)
JSON_RATIO = ["--additional-config", '{"other": 1, "kv_compression": {"keep_ratio": 0.5}}']
JSON_METHOD = ["--additional-config", '{"other": 1, "kv_compression": "sculpt"}']
RATIO = ["--kv-compression-keep-ratio", "0.5"]
METHOD = ["--kv-compression", "sculpt"]


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    register()
    register()
    return arg_utils.AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))


def parse(parser: FlexibleArgumentParser, argv: list[str]) -> tuple[CompressionConfig, dict]:
    additional = arg_utils.AsyncEngineArgs.from_cli_args(parser.parse_args(argv)).additional_config
    return CompressionConfig.from_additional_config(additional), additional


@pytest.mark.parametrize(
    "argv",
    [
        METHOD + RATIO,
        RATIO + METHOD,
        ["--kv_compression=sculpt", "--kv_compression_keep_ratio=0.5"],
        METHOD + JSON_RATIO,
        JSON_RATIO + METHOD,
        RATIO + JSON_METHOD,
        JSON_METHOD + RATIO,
        ["--additional-config.kv_compression.method", "sculpt", "--additional-config.kv_compression.keep_ratio", "0.5"],
        ["--additional-config.kv_compression", "sculpt", *RATIO],
        ["--kv-compression", "select", *RATIO, *METHOD],
        ["--kv-compression-keep-ratio", "0.2", *METHOD, *JSON_RATIO],
    ],
)
def test_every_spelling_and_order_is_one_configuration(parser, argv):
    config, additional = parse(parser, argv)
    assert config == HALF
    assert set(additional) <= {"other", "kv_compression"}
    assert ("other" in additional) == any("other" in word for word in argv)
    json.dumps(additional)


def test_yaml_file_and_command_line_merge_and_the_command_line_wins(parser, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "kv-compression: select\nkv_compression_window: 16\nadditional-config: {kv_compression: {keep_ratio: 0.5}}\n"
    )
    config, _ = parse(parser, ["--config", str(path), *METHOD])
    assert config == CompressionConfig(method="sculpt", window=16, keep_ratio=0.5)


def test_parsing_leaves_the_default_alone(parser):
    parse(parser, METHOD)
    assert parse(parser, [])[1] == {}
    assert parse(parser, ["--additional-config", '{"a": 1}', "--additional-config", '{"b": 1}'])[1] == {"b": 1}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--kv-compression", "sculp"], "--kv-compression: got 'sculp', allowed: none, sculpt, select, select_fit"),
        (["--kv-compression-keep-ratio", "1.5"], "--kv-compression-keep-ratio: got '1.5', allowed: a number > 0 and"),
        (["--kv-compression-sink", "-1"], "--kv-compression-sink: got '-1', allowed: a whole number >= 0"),
        (["--kv_compression_effort=max"], "--kv-compression-effort: got 'max', allowed: fast, balanced, thorough"),
    ],
)
def test_bad_flag_is_an_argparse_error(parser, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_the_group(parser, capsys, monkeypatch):
    monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", None)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help=kv-compression"])
    shown = capsys.readouterr().out
    assert "--kv-compression {none,sculpt,select,select_fit}" in shown
    for field in CompressionConfig.model_fields.keys() - {"method"}:
        assert f"--kv-compression-{field.replace('_', '-')} " in shown


MODEL = SimpleNamespace(
    model="some/model",
    hf_text_config=SimpleNamespace(num_hidden_layers=2),
    get_total_num_kv_heads=lambda: 3,
    model_arch_config=SimpleNamespace(total_num_attention_heads=6),
    get_sliding_window=lambda: None,
    dtype=torch.bfloat16,
    get_num_layers=lambda parallel: 2,
    get_num_kv_heads=lambda parallel: 3,
    get_num_attention_heads=lambda parallel: 6,
    get_head_size=lambda: 64,
)


class StockArgs:
    """Stands in for EngineArgs around a stock `create_engine_config` that records what it saw."""

    _api_process_count, _api_process_rank = 1, 0
    gpu_memory_utilization, kv_cache_memory_bytes = 0.5, None

    def __init__(self, additional_config: dict, block_size: int | None = None, async_scheduling: bool = False) -> None:
        self.additional_config, self.block_size, self.async_scheduling = additional_config, block_size, async_scheduling

    def stock(self) -> SimpleNamespace:
        return SimpleNamespace(
            additional_config=self.additional_config,
            cache_config=SimpleNamespace(block_size=self.block_size or 128, cache_dtype="auto"),
            parallel_config=SimpleNamespace(worker_cls="stock"),
            scheduler_config=SimpleNamespace(scheduler_cls=None, async_scheduling=self.async_scheduling),
            model_config=MODEL,
            use_v2_model_runner=False,
        )


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """The start-up lines; refusals have tests of their own."""
    lines: list[str] = []
    monkeypatch.setattr(hooks, "check_config", lambda args, config: None)
    monkeypatch.setattr(hooks.logger, "info", lambda text, *args: lines.append(text % args))
    return lines


create_engine_config = hooks._with_compression(StockArgs.stock)


@pytest.mark.parametrize("additional_config", [{}, {"other": 1}, {"kv_compression": "none"}])
def test_without_compression_the_configuration_is_stock(log, additional_config):
    args = StockArgs(additional_config)
    assert create_engine_config(args) == args.stock()
    assert args.additional_config is additional_config
    assert args.block_size is None
    assert log == (
        ["KV compression: inactive, because --kv-compression is none."] if "kv_compression" in additional_config else []
    )


@pytest.mark.parametrize(
    ("block_size", "is_async", "scheduler", "stall"),
    [(None, False, "Sculpt", None), (64, True, "SculptAsync", 500.0)],
)
def test_compression_chooses_classes_and_block_size_and_says_so(log, block_size, is_async, scheduler, stall):
    settings = {"method": "sculpt", "keep_ratio": "0.5"} | ({} if stall is None else {"max_stall_ms": stall})
    given = {"other": 1, "kv_compression": dict(settings)}
    config = create_engine_config(StockArgs(given, block_size, is_async))
    assert config.parallel_config.worker_cls == "kvsculpt_vllm.engine.worker.worker_cpu.SculptCPUWorker"
    assert config.scheduler_config.scheduler_cls == f"kvsculpt_vllm.engine.scheduler.scheduler.{scheduler}Scheduler"
    assert config.cache_config.block_size == (block_size or 32)
    assert config.additional_config == {
        "other": 1,
        "kv_compression": HALF.model_dump() | {"max_stall_ms": stall or 200, "calibration": "none"},
    }
    assert given["kv_compression"] == settings
    (line,) = log
    for said in (
        "active",
        "is sculpt",
        "a fraction of 0.5",
        "adaptive",
        "segments of 4096 (2048 if the KV cache is short)",
        f"size {block_size or 32}",
        "LBHNC",
        "runner V1",
    ):
        assert said in line


@pytest.mark.parametrize("method", ["none", "sculpt"])
def test_several_api_servers_say_it_once(log, method):
    for rank in (-1, 0, 1):  # -1 is their parent
        args = StockArgs({"kv_compression": method})
        args._api_process_count, args._api_process_rank = 2, rank
        create_engine_config(args)
    assert len(log) == 1


def test_wrong_configuration_stops_before_vllm_makes_its_own(log):
    with pytest.raises(ConfigError, match="--kv-compression-keep-ratio"):
        create_engine_config(StockArgs({"kv_compression": {"keep_ratio": 0.5}}))
    with pytest.raises(ConfigError, match="--kv-compression-sink: got 32"):
        create_engine_config(StockArgs({"kv_compression": {"method": "sculpt", "sink": 32}}))


def server(additional_config: dict) -> SimpleNamespace:
    return SimpleNamespace(
        additional_config=additional_config, cache_config=SimpleNamespace(block_size=32, cache_dtype="auto")
    )


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}])
@pytest.mark.parametrize("additional_config", [{}, {"kv_compression": "sculpt"}])
def test_request_without_our_keys_passes(additional_config, extra_args):
    request_checks.check_request(server(additional_config), extra_args)


@pytest.mark.parametrize(
    ("additional_config", "extra_args", "beam_search", "message"),
    [
        ({}, {"kv_compression": "none"}, False, "start it with --kv-compression sculpt"),
        ({"kv_compression": "sculpt"}, {"kv_compression": 1}, False, "kv_compression: got 1, allowed: none"),
        ({"kv_compression": "sculpt"}, {"kv_compression_sink": 32}, False, "below the block size 32"),
        ({"kv_compression": "sculpt"}, {"kv_compression_sink": 2}, True, "use_beam_search"),
    ],
)
def test_bad_request_is_a_client_error_that_names_the_setting(additional_config, extra_args, beam_search, message):
    with pytest.raises(VLLMValidationError, match=message) as caught:
        request_checks.check_request(server(additional_config), extra_args, beam_search)
    assert {caught.value.parameter: caught.value.value} == extra_args


def test_streamed_request_is_refused_at_the_call():
    """Later is too late: the HTTP 200 is out once the first result is awaited."""
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    request_checks.install_request_checks()
    request_checks.install_request_checks()
    assert not hasattr(AsyncLLM.generate.__wrapped__, "__wrapped__")
    engine = SimpleNamespace(vllm_config=server({}))
    with pytest.raises(VLLMValidationError):
        AsyncLLM.generate(engine, "prompt", SamplingParams(extra_args={"kv_compression": "sculpt"}), "id")
