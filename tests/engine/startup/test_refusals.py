"""Every unsupported feature is refused, with its cause and its cure."""

import json
import pickle
from functools import reduce
from types import SimpleNamespace

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVQuantMode,
    SlidingWindowSpec,
)

from kvsculpt_vllm.engine.startup.refusals.cache import check_cache_dtype
from kvsculpt_vllm.engine.startup.refusals.configuration import RULES, check_attention_backend, check_config
from kvsculpt_vllm.engine.startup.refusals.device import check_platform, failed_self_test
from kvsculpt_vllm.engine.startup.refusals.groups import check_kv_cache_config
from kvsculpt_vllm.engine.startup.refusals.layers import check_attention_layers
from kvsculpt_vllm.engine.startup.refusals.refusal import UnsupportedFeature
from kvsculpt_vllm.plugin import register

TEXT = "model_config.hf_text_config"
STOCK_ARGS = SimpleNamespace(worker_cls="auto", scheduler_cls=None, enable_dbo=False)


def supported() -> SimpleNamespace:
    """What the rules read, as it is for a model and a server that can be compressed."""
    return SimpleNamespace(
        speculative_config=None,
        kv_transfer_config=None,
        kv_events_config=None,
        diffusion_config=None,
        additional_config={"kv_compression": "sculpt"},
        aux_output_config=SimpleNamespace(enabled=False),
        attention_config=SimpleNamespace(hisparse_config=None, use_non_causal=False),
        device_config=SimpleNamespace(device_type="cpu"),
        cache_config=SimpleNamespace(
            block_size=32,
            cache_dtype="auto",
            kv_cache_dtype_skip_layers=[],
            kv_offloading_size=None,
            kv_sharing_fast_prefill=False,
            prefix_match_unit=None,
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(model_type="llama"),
            dtype=torch.bfloat16,
            attention_chunk_size=None,
            get_sliding_window=lambda: None,
            has_inner_state=False,
            is_attention_free=False,
            is_diffusion=False,
            is_encoder_decoder=False,
            is_hybrid=False,
            is_mm_prefix_lm=False,
            runner_type="generate",
            rswa_window=None,
            supports_multimodal_inputs=True,
            use_mla=False,
            uses_alibi=False,
            uses_mrope=False,
        ),
    )


def put(config: SimpleNamespace, path: str, value: object) -> None:
    *parents, name = path.split(".")
    setattr(reduce(getattr, parents, config), name, value)


CASES = [
    ("speculative_config", object(), "speculative decoding"),
    ("kv_transfer_config", object(), "KV connectors"),
    ("kv_events_config", SimpleNamespace(enable_kv_cache_events=True), "KV cache events"),
    ("cache_config.kv_offloading_size", 1.0, "KV connectors and KV offloading"),
    ("aux_output_config.enabled", True, "routed experts in answers"),
    ("attention_config.hisparse_config", object(), "HiSparse"),
    ("parallel_config.decode_context_parallel_size", 2, "decode context parallelism"),
    ("parallel_config.prefill_context_parallel_size", 2, "prefill context parallelism"),
    ("parallel_config.use_ubatching", True, "dual batch overlap"),
    ("model_config.use_mla", True, "MLA"),
    ("model_config.get_sliding_window", lambda: 1024, "sliding-window"),
    ("model_config.rswa_window", 1024, "sliding-window"),
    ("model_config.is_hybrid", True, "hybrid, Mamba"),
    ("model_config.is_attention_free", True, "hybrid, Mamba"),
    ("model_config.has_inner_state", True, "hybrid, Mamba"),
    (f"{TEXT}.layer_types", ["full_attention", "linear_attention"], "hybrid, Mamba"),
    ("model_config.attention_chunk_size", 1024, "chunked local attention"),
    (f"{TEXT}.num_kv_shared_layers", 2, "share a KV cache"),
    ("cache_config.kv_sharing_fast_prefill", True, "share a KV cache"),
    ("model_config.is_encoder_decoder", True, "encoder-decoder"),
    ("cache_config.cache_dtype", "fp8_e4m3", "quantised KV cache on this device"),
    ("cache_config.cache_dtype", "fp8_e5m2", "quantised KV cache of this kind"),
    ("cache_config.cache_dtype", "float16", "another dtype"),
    ("cache_config.cache_dtype", "int8_per_token_head", "quantised KV cache"),
    (f"{TEXT}.param_sink_number", 128, "attention sinks have keys"),
    ("model_config.uses_alibi", True, "ALiBi"),
    ("model_config.uses_mrope", True, "M-RoPE"),
    ("model_config.is_mm_prefix_lm", True, "non-causal"),
    ("model_config.is_diffusion", True, "non-causal"),
    ("attention_config.use_non_causal", True, "non-causal"),
    ("model_config.runner_type", "pooling", "pooling and embedding"),
    ("cache_config.block_size", 48, "block size"),
    ("cache_config.prefix_match_unit", 16, "inside a block"),
]
ENVIRONMENT = [
    ("VLLM_USE_RUST_FRONTEND", "1", "Rust frontend"),
    ("VLLM_KV_CACHE_LAYOUT", "LBNHC", "VLLM_KV_CACHE_LAYOUT"),
    ("VLLM_KV_CACHE_LAYOUT", "NHD", "VLLM_KV_CACHE_LAYOUT"),
]
ARGUMENTS = [
    ("worker_cls", "my.Worker", "worker class"),
    ("scheduler_cls", "my.Scheduler", "scheduler class"),
    ("enable_dbo", True, "dual batch overlap"),
]


def refused(args: SimpleNamespace, config: SimpleNamespace) -> str:
    """The one feature that is refused."""
    with pytest.raises(UnsupportedFeature) as caught:
        check_config(args, config)
    (refusal,) = caught.value.refusals
    assert str(refusal) in str(caught.value)
    assert refusal.cause
    assert refusal.cure
    return refusal.feature


@pytest.mark.parametrize(("path", "value", "feature"), CASES)
def test_configured_feature_is_refused(path, value, feature):
    config = supported()
    put(config, path, value)
    assert feature in refused(STOCK_ARGS, config)


@pytest.mark.parametrize(("name", "value", "feature"), ENVIRONMENT)
def test_environment_is_refused(monkeypatch, name, value, feature):
    monkeypatch.setenv(name, value)
    assert feature in refused(STOCK_ARGS, supported())


@pytest.mark.parametrize(("name", "value", "feature"), ARGUMENTS)
def test_argument_is_refused(name, value, feature):
    assert feature in refused(SimpleNamespace(**{**vars(STOCK_ARGS), name: value}), supported())


def windowed() -> SimpleNamespace:
    """Of a model that mixes windows with full attention, which is supported."""
    config = supported()
    config.model_config.get_sliding_window = lambda: 512
    config.model_config.hf_text_config.layer_types = ["sliding_attention", "full_attention"]
    config.scheduler_config = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    config.parallel_config.pipeline_parallel_size = 1
    return config


WINDOWED = [
    ("parallel_config.pipeline_parallel_size", 2, "pipeline parallelism"),
    ("scheduler_config.disable_hybrid_kv_cache_manager", True, "one KV cache group"),
    ("additional_config", {"kv_compression": {"method": "sculpt", "store": "/a/directory"}}, "the store"),
]


@pytest.mark.parametrize(("path", "value", "feature"), WINDOWED)
def test_what_goes_without_windows_only_is_refused(path, value, feature):
    config = supported()
    config.model_config.get_sliding_window = lambda: None
    check_config(STOCK_ARGS, config)
    config = windowed()
    check_config(STOCK_ARGS, config)
    put(config, path, value)
    assert feature in refused(STOCK_ARGS, config)


def in_fp8() -> SimpleNamespace:
    """On a GPU, whose kernels read FP8."""
    config = windowed()
    config.model_config.get_sliding_window = lambda: None
    config.device_config.device_type, config.cache_config.cache_dtype = "cuda", "fp8"
    return config


IN_FP8 = [
    ("model_config.get_sliding_window", lambda: 512, "cache of a model with sliding windows"),
    ("cache_config.kv_cache_dtype_skip_layers", ["0"], "leaves out"),
    ("additional_config", {"kv_compression": {"method": "sculpt", "store": "/a/directory"}}, "with a quantised"),
]


@pytest.mark.parametrize(("path", "value", "feature"), IN_FP8)
def test_what_goes_without_fp8_only_is_refused(monkeypatch, path, value, feature):
    monkeypatch.setattr(type(current_platform), "has_device_capability", staticmethod(lambda least: True))
    config = in_fp8()
    check_config(STOCK_ARGS, config)
    put(config, path, value)
    assert feature in refused(STOCK_ARGS, config)


def test_a_gpu_that_does_not_compute_with_fp8_is_refused(monkeypatch):
    asked = []
    monkeypatch.setattr(
        type(current_platform), "has_device_capability", staticmethod(lambda least: asked.append(least) or False)
    )
    assert "on this device" in refused(STOCK_ARGS, in_fp8())
    assert asked == [89]


def test_fp8_that_a_checkpoint_chose_is_looked_at_once_more(monkeypatch):
    config = in_fp8()
    monkeypatch.setattr(type(current_platform), "has_device_capability", staticmethod(lambda least: True))
    check_cache_dtype(config)
    config.device_config.device_type = "cpu"
    with pytest.raises(UnsupportedFeature, match="on this device"):
        check_cache_dtype(config)


def test_windows_alone_are_refused():
    config = windowed()
    config.model_config.hf_text_config.layer_types = ["sliding_attention"]
    assert "sliding-window models" in refused(STOCK_ARGS, config)


def test_every_rule_has_a_case():
    tested = [feature for _, _, feature in CASES + ENVIRONMENT + ARGUMENTS + WINDOWED + IN_FP8]
    for rule in RULES:
        assert any(feature in rule.refusal.feature for feature in tested), rule.refusal.feature


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_config.hf_text_config.layer_types", ["full_attention"]),
        ("cache_config.prefix_match_unit", 32),
        ("cache_config.cache_dtype", "bfloat16"),
    ],
)
def test_harmless_settings_pass(monkeypatch, path, value):
    config = supported()
    put(config, path, value)
    # A window that no layer uses.
    config.model_config.get_sliding_window = lambda: 1024 if path.endswith("layer_types") else None
    for layout in ("BLHNC", "LBHNC", "HND"):
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
        check_config(STOCK_ARGS, config)


def test_all_refusals_come_in_one_error_that_survives_a_process_boundary():
    config = supported()
    config.speculative_config = object()
    config.model_config.uses_alibi = True
    with pytest.raises(UnsupportedFeature) as caught:
        check_config(STOCK_ARGS, config)
    error = pickle.loads(pickle.dumps(caught.value))
    assert len(error.refusals) == 2
    assert str(error) == str(caught.value)


@pytest.fixture
def llama(tmp_path) -> str:
    """A model directory with a configuration only."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 128,
                "max_position_embeddings": 4096,
            }
        )
    )
    return str(tmp_path)


def test_real_configuration_has_what_the_rules_read_and_passes(llama):
    """The rules are tested on stand-ins; this keeps the stand-ins honest."""
    register()
    args = EngineArgs(model=llama, skip_tokenizer_init=True, additional_config={"kv_compression": "sculpt"})
    config = args.create_engine_config()
    assert config.cache_config.block_size == 32
    assert config.parallel_config.worker_cls.endswith(".SculptCPUWorker")
    assert config.scheduler_config.scheduler_cls.endswith(".SculptScheduler")

    def compare(stand_in: SimpleNamespace, real: object) -> None:
        for name, value in vars(stand_in).items():
            assert hasattr(real, name), name
            if isinstance(value, SimpleNamespace):
                compare(value, getattr(real, name))

    compare(supported(), config)


def platform(device_name):
    return SimpleNamespace(
        device_name=device_name, is_cpu=lambda: device_name == "cpu", is_cuda=lambda: device_name == "cuda"
    )


def test_devices_without_a_worker_are_refused():
    check_platform(platform("cpu"))
    check_platform(platform("cuda"))
    with pytest.raises(UnsupportedFeature, match="XPU devices: there is no worker for them"):
        check_platform(platform("xpu"))


def test_a_device_whose_self_test_failed_is_refused_with_every_ranks_words():
    refused = failed_self_test(["rank 0: loss: off by 1", "rank 3: store: off by 2"])
    assert [refusal.feature for refusal in refused.refusals] == ["this device"] * 2
    assert "rank 3: store: off by 2; please report this" in str(refused)


def test_another_attention_backend_is_refused_where_ours_is_needed():
    check_attention_backend(EngineArgs(model="m"))
    check_attention_backend(EngineArgs(model="m", attention_backend="CUSTOM"))
    for asked in ({"attention_backend": "FLASH_ATTN"}, {"attention_config": {"backend": "FLASH_ATTN"}}):
        with pytest.raises(UnsupportedFeature, match=r"the attention backend FLASH_ATTN: .*; remove --attention-back"):
            check_attention_backend(EngineArgs(model="m", **asked))


def spec(kind: type = FullAttentionSpec, **changes: object) -> FullAttentionSpec:
    return kind(**{"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16, **changes})


def kv_cache(*specs: FullAttentionSpec, layout: str | None = "BLHNC") -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups, kv_cache_layout=layout)


WINDOW = spec(SlidingWindowSpec, sliding_window=64)


def test_plain_kv_cache_passes():
    check_kv_cache_config(kv_cache(spec()))
    check_kv_cache_config(kv_cache(WINDOW, spec(), WINDOW))


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        (kv_cache(), "0 KV cache groups"),
        (kv_cache(spec(), spec()), "2 KV cache groups"),
        (kv_cache(spec(), WINDOW, spec()), "2 KV cache groups"),
        (kv_cache(WINDOW, WINDOW), "SlidingWindowSpec"),
        (kv_cache(WINDOW, spec(head_size_v=32)), "blocks of several sizes"),
        (kv_cache(WINDOW, spec(block_size=64)), "blocks of several sizes"),
        (kv_cache(spec(SlidingWindowSpec, sliding_window=64)), "SlidingWindowSpec"),
        (kv_cache(spec(type("Sub", (FullAttentionSpec,), {}))), "Sub"),
        (kv_cache(spec(sliding_window=64)), "sliding_window=64"),
        (kv_cache(spec(attention_chunk_size=64)), "attention_chunk_size=64"),
        (kv_cache(spec(head_size_v=32)), "head_size_v=32"),
        (kv_cache(spec(page_size_padded=1 << 20)), "page_size_padded"),
        (kv_cache(spec(kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD)), "kv_quant_mode"),
        (kv_cache(spec(non_causal=True)), "non_causal"),
        (kv_cache(spec(), layout="LBNHC"), "layout LBNHC"),
    ],
)
def test_other_kv_caches_are_refused(config, feature):
    with pytest.raises(UnsupportedFeature, match=feature):
        check_kv_cache_config(config)


def implementation(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**{"alibi_slopes": None, "logits_soft_cap": 0, "scale": 0.125, **changes})


def layer(kind: type = Attention, **changes: object) -> Attention:
    result = kind.__new__(kind)
    torch.nn.Module.__init__(result)
    plain = {
        "attn_type": "decoder",
        "sliding_window": None,
        "has_sink": False,
        "kv_sharing_target_layer_name": None,
        "use_mm_prefix": False,
        "head_size": 64,
        "head_size_v": 64,
        "num_heads": 8,
        "num_kv_heads": 2,
        "kv_cache_dtype": "auto",
        "impl": implementation(),
    }
    for name, value in {**plain, **changes}.items():
        setattr(result, name, value)
    return result


def test_plain_layers_pass():
    check_attention_layers({"a": layer(), "b": layer(has_sink=True)})
    check_attention_layers({name: layer(impl=implementation(logits_soft_cap=30.0)) for name in "ab"})


@pytest.mark.parametrize(
    ("odd", "feature"),
    [
        (layer(attn_type="encoder_only"), "encoder_only attention"),
        (layer(sliding_window=64), "sliding-window attention"),
        (layer(kv_sharing_target_layer_name="a"), "shared between layers"),
        (layer(use_mm_prefix=True), "non-causal"),
        (layer(kv_cache_update_bypass=True), "the model writes itself"),
        (layer(head_size_v=32), "values of another size"),
        (layer(kv_cache_dtype="fp8_e5m2"), "quantised"),
        (layer(impl=implementation(alibi_slopes=torch.ones(1))), "ALiBi"),
        (layer(impl=implementation(logits_soft_cap=30.0)), "several soft caps on attention"),
        (layer(type("ChunkedAttention", (Attention,), {})), "ChunkedAttention"),
        (layer(num_heads=16), "several head sizes or numbers of heads"),
        (layer(num_kv_heads=4), "several head sizes or numbers of heads"),
        (layer(head_size=128, head_size_v=128), "several head sizes or numbers of heads"),
        (layer(impl=implementation(scale=0.25)), "several scales of attention"),
    ],
)
def test_odd_layer_is_refused_by_name(odd, feature):
    with pytest.raises(UnsupportedFeature, match=rf"{feature}.* \(.*odd"):
        check_attention_layers({"plain": layer(), "odd": odd})
