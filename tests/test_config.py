"""One configuration from every spelling, and one error for everything that is wrong."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsculpt_vllm.config import (
    SERVER_ONLY,
    CompressionConfig,
    ConfigError,
    flag,
    parse_field,
    request_key,
)
from kvsculpt_vllm.sculpt.options import METHODS

SCULPT = CompressionConfig(method="sculpt")

configs = st.builds(
    CompressionConfig,
    method=st.sampled_from(sorted(METHODS)),
    keep_ratio=st.floats(0, 1, exclude_min=True),
    keep_tokens=st.integers(0, 2**40),
    budget=st.sampled_from(["uniform", "adaptive"]),
    min_tokens=st.integers(1, 2**40),
    sink=st.integers(0, 2**40),
    window=st.integers(1, 2**40),
    effort=st.sampled_from(["fast", "balanced", "thorough"]),
    max_error=st.floats(1e-9, 1e9),
    max_stall_ms=st.floats(0, 1e9),
    calibration=st.text(),
    store=st.text(),
    store_mode=st.sampled_from(["read", "readwrite"]),
    store_size=st.integers(0, 2**60),
    pin_blocks=st.just("auto") | st.integers(0, 2**40),
)


@given(configs)
def test_survives_json_and_text(config):
    through_json = json.loads(json.dumps({"kv_compression": config.model_dump()}))
    assert CompressionConfig.from_additional_config(through_json) == config
    as_text = {field: str(value) for field, value in config.model_dump().items()}
    assert CompressionConfig.from_additional_config({"kv_compression": as_text}) == config


@given(configs)
def test_request_can_give_every_setting(config):
    given = config.model_dump(exclude=SERVER_ONLY)
    of_request = SCULPT.for_request({request_key(field): value for field, value in given.items()})
    assert of_request == config.model_copy(update={field: getattr(SCULPT, field) for field in SERVER_ONLY})


def test_request_cannot_change_what_is_the_servers():
    with pytest.raises(ConfigError, match=r"kv_compression_max_stall_ms: got 5.*setting of the server"):
        SCULPT.for_request({"kv_compression_max_stall_ms": 5})


def test_no_request_gets_more_effort_than_the_server_allows():
    server = CompressionConfig.from_additional_config(
        {"kv_compression": {"method": "sculpt", "effort": "fast", "max_effort": "balanced"}}
    )
    assert server.for_request({"kv_compression_effort": "balanced"}).effort == "balanced"
    with pytest.raises(ConfigError, match=r"kv_compression_effort: got 'thorough', allowed: fast, balanced \(--kv"):
        server.for_request({"kv_compression_effort": "thorough"})
    with pytest.raises(ConfigError, match=r"kv_compression_max_effort: got 'thorough'.*setting of the server"):
        server.for_request({"kv_compression_max_effort": "thorough"})
    with pytest.raises(ConfigError, match="--kv-compression-effort: got 'balanced', allowed: fast"):
        CompressionConfig.from_additional_config({"kv_compression": {"method": "sculpt", "max_effort": "fast"}})


@pytest.mark.parametrize("additional_config", [{}, {"other": 1}, {"kv_compression": None}, None, object()])
def test_absent_means_inactive(additional_config):
    assert CompressionConfig.from_additional_config(additional_config) == CompressionConfig()
    assert not CompressionConfig().active


def test_plain_name_is_the_method():
    assert CompressionConfig.from_additional_config({"kv_compression": "sculpt"}) == SCULPT
    assert SCULPT.active


def test_request_without_our_keys_costs_no_new_configuration():
    assert SCULPT.for_request(None) is SCULPT
    assert SCULPT.for_request({"session_id": "x"}) is SCULPT


def test_request_can_switch_compression_off_and_keep_its_other_settings():
    assert not SCULPT.for_request({"kv_compression": "none", "kv_compression_keep_ratio": 0.5}).active


def test_a_request_that_names_a_fraction_does_not_mean_the_servers_number_of_tokens():
    server = SCULPT.model_copy(update={"keep_tokens": 600})
    assert server.kept(2000) == 0.3
    assert server.kept(500) == 1
    assert server.for_request({"kv_compression_keep_ratio": 0.5}).kept(2000) == 0.5
    assert server.for_request({"kv_compression_window": 32}).kept(2000) == 0.3
    assert SCULPT.for_request({"kv_compression_keep_tokens": 500}).kept(2000) == 0.25


WRONG = [
    ("method", "scuplt", "none, sculpt, select, select_fit"),
    ("method", 1, "none, sculpt, select, select_fit"),
    ("keep_ratio", 0, "a number > 0 and <= 1"),
    ("keep_ratio", 1.01, "a number > 0 and <= 1"),
    ("keep_ratio", float("nan"), "a number > 0 and <= 1"),
    ("keep_ratio", True, "a number > 0 and <= 1"),
    ("keep_ratio", "much", "a number > 0 and <= 1"),
    ("keep_ratio", [0.5], "a number > 0 and <= 1"),
    ("budget", "even", "uniform, adaptive"),
    ("budget", None, "uniform, adaptive"),
    ("min_tokens", 0, "a whole number >= 1"),
    ("min_tokens", 3.5, "a whole number >= 1"),
    ("sink", -1, "a whole number >= 0"),
    ("window", 0, "a whole number >= 1"),
    ("effort", "max", "fast, balanced, thorough"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), WRONG)
def test_wrong_value_names_option_given_and_allowed(field, value, allowed):
    with pytest.raises(ConfigError) as at_start:
        CompressionConfig.from_additional_config({"kv_compression": {"method": "sculpt", field: value}})
    with pytest.raises(ConfigError) as in_request:
        SCULPT.for_request({request_key(field): value})
    with pytest.raises(ConfigError):
        parse_field(field, value)
    for error, option in ((at_start.value, flag(field)), (in_request.value, request_key(field))):
        assert error.option == option
        assert error.given is value
        assert error.allowed == allowed
        assert str(error) == f"{option}: got {value!r}, allowed: {allowed}"


def test_everything_wrong_is_one_error_that_survives_a_process_boundary():
    with pytest.raises(ConfigError) as caught:
        SCULPT.for_request({"kv_compression": "x", "kv_compression_sink": -1, "kv_compression_keep_ration": 1})
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value)
    assert {problem.option for problem in error.wrong} == {
        "kv_compression",
        "kv_compression_sink",
        "kv_compression_keep_ration",
    }


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("kv_compression_keep_ration", "kv_compression_keep_ratio"),
        ("kv-compression", "kv_compression"),
        ("KV_compression_window", "kv_compression_window"),
        ("kv_compression_method", "kv_compression"),
        ("kv_compressions", "kv_compression"),
    ],
)
def test_unknown_request_key_names_the_nearest(key, nearest):
    with pytest.raises(ConfigError, match=f"{key}: got 1, .*did you mean {nearest}[?]"):
        SCULPT.for_request({key: 1})


def test_unknown_setting_at_start_lists_the_known():
    with pytest.raises(ConfigError, match=r"kv_compression\.ratio: got 1, .*keep_ratio.*effort"):
        CompressionConfig.from_additional_config({"kv_compression": {"method": "sculpt", "ratio": 1}})


@pytest.mark.parametrize("settings", [{"sink": 2}, {"sink": 2, "method": "none"}])
def test_settings_without_a_method_say_how_to_turn_it_on(settings):
    with pytest.raises(ConfigError, match=r"--kv-compression-sink: got 2, .*add --kv-compression sculpt"):
        CompressionConfig.from_additional_config({"kv_compression": settings})


@pytest.mark.parametrize("key", ["kv_compression", "kv_compression_sink", "kv_compression_foo"])
def test_request_to_a_server_without_compression_says_how_to_turn_it_on(key):
    with pytest.raises(ConfigError, match="start it with --kv-compression sculpt"):
        CompressionConfig().for_request({key: "none"})


def test_sink_must_be_smaller_than_a_block():
    config = CompressionConfig(method="sculpt", sink=16)
    config.check_block_size(32, flag)
    with pytest.raises(ConfigError, match=r"kv_compression_sink: got 16, .*below the block size 16"):
        config.check_block_size(16, request_key)
    CompressionConfig(sink=16).check_block_size(16, flag)


@pytest.mark.parametrize(("given", "segment"), [("auto", 4096), ("4096", 4096), (1024, 1024)])
def test_the_length_of_a_segment_is_given_or_the_models(given, segment):
    settings = {"method": "sculpt", "segment": given}
    assert CompressionConfig.from_additional_config({"kv_compression": settings}).for_model(17_280).segment == segment
    assert parse_field("segment", given) == (given if given == "auto" else segment)


@pytest.mark.parametrize("given", [63, "long", 2048.5, None])
def test_a_segment_of_no_length_is_refused(given):
    with pytest.raises(ConfigError, match=r"--kv-compression-segment: got .*, allowed: auto, or a whole number >= 64"):
        CompressionConfig.from_additional_config({"kv_compression": {"method": "sculpt", "segment": given}})


def test_what_is_given_for_answers_is_no_longer_than_the_models_segments():
    given = {"kv_compression": {"method": "sculpt", "decode": 3000}}
    config = CompressionConfig.from_additional_config(given)
    assert config.for_model(17_280).decode == 3000
    with pytest.raises(
        ConfigError, match=r"--kv-compression-decode: got 3000, .*up to --kv-c.*-segment, which is 2048"
    ):
        config.for_model(131_072)
