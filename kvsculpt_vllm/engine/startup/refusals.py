"""What compression does not support: refused at start-up, each with its cause and cure.

Five moments, because more is known at each: the configuration (`check_config`), the KV cache's groups
(`check_kv_cache_config`), the attention layers of the loaded model (`check_attention_layers`), the queries that it
asks (`check_positions`), and what its device computes (`failed_self_test`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import vllm.envs as envs
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.groups import full_group, has_windows
from kvsculpt_vllm.engine.shared.stores import NO_STORE
from kvsculpt_vllm.layer_kinds import FULL, WINDOW

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import KVCacheConfig

LAYOUTS = ("BLHNC", "LBHNC")
DEFAULT_LAYOUT = "LBHNC"
# The smallest block of the attention kernels by platform; larger ones must be multiples of it.
KERNEL_BLOCK_SIZE = {"cpu": 32, "cuda": 16}

_OTHER_MODEL = "choose a model of plain full attention"


class Refusal(NamedTuple):
    """A feature that was found, why compression cannot work with it, and what to do."""

    feature: str
    cause: str
    cure: str

    def __str__(self) -> str:
        return f"{self.feature}: {self.cause}; {self.cure}"


class UnsupportedFeature(ValueError):
    """The server cannot compress as it is configured. `refusals` holds every reason."""

    def __init__(self, refusals: list[Refusal]) -> None:
        reasons = "".join(f"\n- {refusal}" for refusal in refusals)
        super().__init__(f"--kv-compression cannot be used here (--kv-compression none turns it off):{reasons}")
        self.refusals = tuple(refusals)

    def __reduce__(self) -> tuple:
        # The default would rebuild it from the message; vLLM passes errors between processes.
        return type(self), (list(self.refusals),)


class _Rule(NamedTuple):
    found: Callable[[VllmConfig], Any]
    refusal: Refusal


def requested_layout() -> str | None:
    """The layout that `VLLM_KV_CACHE_LAYOUT` asks for, older names resolved."""
    name: str | None = envs.VLLM_KV_CACHE_LAYOUT
    return {"NHD": "LBNHC", "HND": "LBHNC"}.get(name, name) if name is not None else None


def _text_config(config: VllmConfig, *names: str) -> bool:
    return any(getattr(config.model_config.hf_text_config, name, None) for name in names)


def _sliding_window(config: VllmConfig) -> bool:
    model = config.model_config
    layers = getattr(model.hf_text_config, "layer_types", None) or (WINDOW,)
    only_windows = WINDOW in layers and FULL not in layers
    return bool(model.rswa_window) or (model.get_sliding_window() is not None and only_windows)


def _mixed_layers(config: VllmConfig) -> bool:
    model = config.model_config
    types = set(getattr(model.hf_text_config, "layer_types", None) or ())
    other = types - {"full_attention", "attention", "sliding_attention", "chunked_attention"}  # with their own rules
    return model.is_hybrid or model.is_attention_free or model.has_inner_state or bool(other)


def _block_size(config: VllmConfig) -> bool:
    if config.model_config.use_mla:  # refused anyway, and vLLM sets the block size itself
        return False
    return config.cache_config.block_size % KERNEL_BLOCK_SIZE[config.device_config.device_type] != 0


def _other_cache_dtype(config: VllmConfig) -> bool:
    dtype, model = config.cache_config.cache_dtype, config.model_config
    if is_quantized_kv_cache(dtype):  # which has a rule of its own
        return False
    return kv_cache_dtype_str_to_dtype(dtype, model) != model.dtype


def _fine_prefix_match(config: VllmConfig) -> bool:
    return config.cache_config.prefix_match_unit not in (None, config.cache_config.block_size)


# Read after vLLM has made its configuration. Rules about the engine's arguments, which vLLM changes on the way, are
# in `check_engine_args`.
_RULES = (
    _Rule(
        lambda c: c.speculative_config is not None,
        Refusal(
            "speculative decoding",
            "drafted tokens are verified against the whole cache",
            "remove --speculative-config and the --spec-* flags",
        ),
    ),
    _Rule(
        lambda c: c.kv_transfer_config is not None or c.cache_config.kv_offloading_size is not None,
        Refusal(
            "KV connectors and KV offloading",
            "they move blocks whose contents compression replaces",
            "remove --kv-transfer-config and --kv-offloading-size",
        ),
    ),
    _Rule(
        lambda c: c.kv_events_config is not None and c.kv_events_config.enable_kv_cache_events,
        Refusal(
            "KV cache events",
            "a block that is packed, or computed from packed ones, has no name that others know",
            "remove --kv-events-config",
        ),
    ),
    _Rule(
        lambda c: c.aux_output_config.enabled,
        Refusal(
            "routed experts in answers",
            "they are kept by the names of blocks, and what a segment stands for has other names or none",
            "remove --enable-return-routed-experts and --aux-output-config",
        ),
    ),
    _Rule(
        lambda c: c.attention_config.hisparse_config is not None,
        Refusal("HiSparse", "it keeps the KV cache on the host", "remove hisparse_config from --attention-config"),
    ),
    _Rule(
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
        Refusal(
            "decode context parallelism",
            "it spreads one request's tokens over several caches",
            "remove --decode-context-parallel-size",
        ),
    ),
    _Rule(
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
        Refusal(
            "prefill context parallelism",
            "it spreads one request's tokens over several caches",
            "remove --prefill-context-parallel-size",
        ),
    ),
    _Rule(
        lambda c: c.parallel_config.use_ubatching,
        Refusal(
            "dual batch overlap and micro-batches",
            "attention sees half a batch at a time",
            "remove --enable-dbo and --ubatch-size",
        ),
    ),
    _Rule(
        lambda c: c.model_config.use_mla,
        Refusal("MLA models", "their cache holds latents, no keys and values", _OTHER_MODEL),
    ),
    _Rule(
        _sliding_window,
        Refusal(
            "sliding-window models",
            "no layer sees more than the last tokens, so there is nothing to compress",
            f"add --disable-sliding-window, which limits the context to the window, or {_OTHER_MODEL}",
        ),
    ),
    _Rule(
        lambda c: has_windows(c) and c.parallel_config.pipeline_parallel_size > 1,
        Refusal(
            "pipeline parallelism of a model with sliding windows",
            "ranks have different numbers of layers that are compressed",
            "use --tensor-parallel-size in the place of --pipeline-parallel-size",
        ),
    ),
    _Rule(
        lambda c: has_windows(c) and c.scheduler_config.disable_hybrid_kv_cache_manager,
        Refusal(
            "one KV cache group for windows and full attention",
            "compression would have to leave some layers of a block alone",
            "remove --disable-hybrid-kv-cache-manager",
        ),
    ),
    _Rule(
        lambda c: has_windows(c) and CompressionConfig.from_additional_config(c.additional_config).store != NO_STORE,
        Refusal(
            "the store of a model with sliding windows",
            "a segment in it has no windows to go on from",
            "remove --kv-compression-store",
        ),
    ),
    _Rule(
        _mixed_layers,
        Refusal("hybrid, Mamba and linear-attention models", "not every layer has a KV cache", _OTHER_MODEL),
    ),
    _Rule(
        lambda c: c.model_config.attention_chunk_size is not None,
        Refusal("models with chunked local attention", "a layer sees one chunk of the context", _OTHER_MODEL),
    ),
    _Rule(
        lambda c: _text_config(c, "num_kv_shared_layers") or c.cache_config.kv_sharing_fast_prefill,
        Refusal(
            "models whose layers share a KV cache",
            "a shared cache would be fitted for one layer's queries only",
            _OTHER_MODEL,
        ),
    ),
    _Rule(
        lambda c: c.model_config.is_encoder_decoder,
        Refusal("encoder-decoder models", "cross-attention has a cache of its own", _OTHER_MODEL),
    ),
    _Rule(
        lambda c: is_quantized_kv_cache(c.cache_config.cache_dtype),
        Refusal(
            "a quantised KV cache",
            "optimised keys and values have no scales to be stored with",
            "leave out --kv-cache-dtype",
        ),
    ),
    _Rule(
        _other_cache_dtype,
        Refusal(
            "a KV cache of another dtype than the model's",
            "queries are kept, and keys fitted to them, in the model's",
            "leave out --kv-cache-dtype",
        ),
    ),
    _Rule(
        lambda c: _text_config(c, "param_sink_number"),
        Refusal("models whose attention sinks have keys", "the fit does not know these entries", _OTHER_MODEL),
    ),
    _Rule(
        lambda c: c.model_config.uses_alibi,
        Refusal("ALiBi models", "attention depends on positions that packed entries do not have", _OTHER_MODEL),
    ),
    _Rule(
        lambda c: c.model_config.uses_mrope and c.model_config.supports_multimodal_inputs,
        Refusal(
            "M-RoPE models that read more than text",
            "a token of an image has several positions, none of which is its place in the prompt",
            "add --language-model-only",
        ),
    ),
    _Rule(
        lambda c: (
            c.model_config.is_mm_prefix_lm
            or c.model_config.is_diffusion
            or c.diffusion_config is not None
            or c.attention_config.use_non_causal
        ),
        Refusal("models with non-causal attention", "the fit takes attention to be causal", _OTHER_MODEL),
    ),
    _Rule(
        lambda c: c.model_config.runner_type != "generate",
        Refusal(
            "pooling and embedding models",
            "they do not decode, so there is nothing to save",
            "remove --kv-compression",
        ),
    ),
    _Rule(
        lambda c: envs.VLLM_USE_RUST_FRONTEND,
        Refusal(
            "the Rust frontend",
            "it does not run Python plugins, so requests would go unchecked",
            "unset VLLM_USE_RUST_FRONTEND",
        ),
    ),
    _Rule(
        lambda c: requested_layout() not in (None, *LAYOUTS),
        Refusal(
            "the KV cache layout of VLLM_KV_CACHE_LAYOUT",
            "one head's entries of a block must lie together",
            f"set it to {' or '.join(LAYOUTS)}, or unset it",
        ),
    ),
    _Rule(
        _block_size,
        Refusal(
            "this block size",
            "the attention kernel reads whole blocks",
            "use --block-size with a multiple of 32 on a CPU and of 16 on CUDA, or leave it out",
        ),
    ),
    _Rule(
        _fine_prefix_match,
        Refusal("prefix-cache hits inside a block", "only whole blocks are compressed", "remove --prefix-match-unit"),
    ),
)


def known_refusals() -> list[Refusal]:
    """Every refusal that a configuration can bring about, for people to read."""
    return [rule.refusal for rule in _RULES]


def check_platform(platform: Any) -> None:
    """Refuse a device for which there is no worker. Kernels are tested on CUDA once there is a KV cache.

    Raises:
        UnsupportedFeature: on anything but a CPU and CUDA.
    """
    if not (platform.is_cpu() or platform.is_cuda()):
        name = platform.device_name.upper() if platform.device_name else "this device"
        cause = "there is no worker for them"
        raise UnsupportedFeature([Refusal(f"{name} devices", cause, "use --kv-compression none or the CPU build")])


def check_attention_backend(args: EngineArgs) -> None:
    """Refuse another attention backend where compression needs its own; asking for ours is fine.

    Raises:
        UnsupportedFeature: naming the one that was asked for.
    """
    config = args.attention_config
    asked = {args.attention_backend, config.backend, *config.backend_per_kind.values()}
    names = sorted({str(getattr(backend, "name", backend)) for backend in asked - {None}} - {"CUSTOM"})
    if names:
        cause = "compressed rows are read by a kernel of our own"
        _refuse([Refusal(f"the attention backend {', '.join(names)}", cause, "remove --attention-backend")])


def check_config(args: EngineArgs, config: VllmConfig) -> None:
    """Refuse every unsupported feature that the configuration shows, all in one error.

    Args:
        args: what the user gave; vLLM resolves or drops some of it on the way to `config`.
        config: what vLLM made of it.

    Raises:
        UnsupportedFeature: naming each feature, why, and what to do.
    """
    found = [*_of_args(args), *(rule.refusal for rule in _RULES if rule.found(config))]
    _refuse(dict.fromkeys(found))


def _of_args(args: EngineArgs) -> Iterable[Refusal]:
    own = "compression runs in its own, which cannot be combined with another"
    if args.worker_cls != "auto":
        yield Refusal("a worker class of your own", own, "remove --worker-cls")
    if args.scheduler_cls is not None:
        yield Refusal("a scheduler class of your own", own, "remove --scheduler-cls")
    if args.enable_dbo:  # dropped by vLLM on a CPU, with a warning
        yield next(rule.refusal for rule in _RULES if rule.refusal.feature.startswith("dual batch"))


def check_kv_cache_config(config: KVCacheConfig) -> None:
    """Refuse a KV cache that is not one group of plain full attention, with or without groups of windows beside it.

    Raises:
        UnsupportedFeature: as soon as a page is anything but `[block_size, K|V]` of one head.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    if not specs:
        _refuse([Refusal("0 KV cache groups", "there is nothing to compress", _OTHER_MODEL)])
    spec = specs.pop(full_group(config.kv_cache_groups))
    if others := [other for other in specs if type(other) is not SlidingWindowSpec]:
        count, kinds = len(others) + 1, ", ".join(sorted({type(other).__name__ for other in (spec, *others)}))
        cause = "compression rewrites the blocks of one group, and leaves alone those of windows"
        _refuse([Refusal(f"{count} KV cache groups ({kinds})", cause, _OTHER_MODEL)])
    if any((other.block_size, other.page_size_bytes) != (spec.block_size, spec.page_size_bytes) for other in specs):
        cause = "a packed block and one of a window take each other's place"
        _refuse([Refusal("KV cache groups with blocks of several sizes", cause, _OTHER_MODEL)])
    if type(spec) is not FullAttentionSpec:
        raise UnsupportedFeature(
            [Refusal(type(spec).__name__, "only plain full attention can be compressed", _OTHER_MODEL)]
        )
    plain = FullAttentionSpec(
        block_size=spec.block_size, num_kv_heads=spec.num_kv_heads, head_size=spec.head_size, dtype=spec.dtype
    )
    # They say how requests share the cache among ranks and what it is aligned to, not what is in a page.
    # `is_draft` (vLLM 0.33) names a drafter's layers; speculative decoding has a refusal of its own.
    free = {"dcp_sharded", "max_tp_shards", "block_stride_alignment", "is_draft"}
    odd = [
        name for name in plain.__dataclass_fields__ if name not in free and getattr(spec, name) != getattr(plain, name)
    ]
    if odd:
        values = ", ".join(f"{name}={getattr(spec, name)}" for name in odd)
        _refuse([Refusal(f"a KV cache with {values}", "pages must hold plain keys and values", _OTHER_MODEL)])
    if config.kv_cache_layout not in (None, *LAYOUTS):
        cure = f"set VLLM_KV_CACHE_LAYOUT to {' or '.join(LAYOUTS)}"
        _refuse([Refusal(f"layout {config.kv_cache_layout}", "one head's entries of a block must lie together", cure)])


def check_attention_layers(layers: dict[str, Attention]) -> None:
    """Refuse layers whose attention the fit does not model, and layers that do not share one page format.

    Args:
        layers: the model's attention layers by name, as in `static_forward_context`.

    Raises:
        UnsupportedFeature: naming the first layer of every kind that was found.
    """
    from vllm.model_executor.layers.attention import Attention

    found: dict[str, str] = {}
    for name, layer in layers.items():
        for feature in _odd_attention(layer) if type(layer) is Attention else [type(layer).__name__]:
            found.setdefault(feature, name)
    plain = {name: layer for name, layer in layers.items() if type(layer) is Attention}
    shapes = {(layer.head_size, layer.num_heads, layer.num_kv_heads): name for name, layer in plain.items()}
    if len(shapes) > 1:
        found["several head sizes or numbers of heads"] = ", ".join(shapes.values())
    scales = {layer.impl.scale: name for name, layer in plain.items()}
    if len(scales) > 1:
        found["several scales of attention"] = ", ".join(scales.values())
    caps = {getattr(layer.impl, "logits_soft_cap", None) or None: name for name, layer in plain.items()}
    if len(caps) > 1:
        found["several soft caps on attention"] = ", ".join(caps.values())
    _refuse([Refusal(f"{what} ({name})", "the fit does not model it", _OTHER_MODEL) for what, name in found.items()])


def check_positions(restless: list[str], unexplained: list[str]) -> None:
    """Refuse attention layers whose queries cannot be asked from elsewhere.

    Args:
        restless: names of layers whose queries change with the other tokens of their step.
        unexplained: names of layers whose queries depend on the position in a way that is not known.

    Raises:
        UnsupportedFeature: naming the first layer of each.
    """
    found = []
    if restless:
        cause = "what a query looks like depends on the longest position of its step (dynamic RoPE, LongRoPE)"
        cure = "leave out --model-impl, or set --max-model-len to no more than the model's original context"
        found.append(Refusal(f"positions of {restless[0]}", cause, cure))
    if unexplained:
        cause = "no rotary embedding was found that turns its queries as the model does, so none can be asked anew"
        found.append(Refusal(f"positions of {unexplained[0]}", cause, f"try another --model-impl, or {_OTHER_MODEL}"))
    _refuse(found)


def unseen_queries(layer: str, error: Exception) -> UnsupportedFeature:
    """The refusal of a model that fails when it is run to see what its attention layers are asked."""
    cause = f"a trial run that shows what it is asked failed ({type(error).__name__}: {error})"
    return UnsupportedFeature([Refusal(f"positions of {layer}", cause, f"try another --model-impl, or {_OTHER_MODEL}")])


def failed_self_test(failures: Iterable[str]) -> UnsupportedFeature:
    """The refusal of devices on which kernels do not compute what they should, each rank's failure in words."""
    cure = "please report this, and use --kv-compression none until it is mended"
    return UnsupportedFeature([Refusal("this device", f"its self-test failed: {words}", cure) for words in failures])


def _odd_attention(layer: Attention) -> Iterable[str]:
    if layer.attn_type != "decoder":
        yield f"{layer.attn_type} attention"
    if layer.sliding_window is not None:
        yield "sliding-window attention"
    if layer.kv_sharing_target_layer_name is not None:
        yield "a KV cache shared between layers"
    if layer.use_mm_prefix:
        yield "non-causal attention to a prefix"
    if getattr(layer, "kv_cache_update_bypass", False):  # vLLM 0.33
        yield "a KV cache that the model writes itself"
    if layer.head_size_v != layer.head_size:
        yield "values of another size than keys"
    if is_quantized_kv_cache(layer.kv_cache_dtype):
        yield "a quantised KV cache"
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        yield "ALiBi"


def _refuse(refusals: Iterable[Refusal]) -> None:
    if refusals := list(refusals):
        raise UnsupportedFeature(refusals)
