"""The rotary embeddings that tiny models are found to have, against transformers' own code; moved queries against
vLLM's own rotary modules.
"""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, get_rope
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.models.transformers.base import Base
from vllm.utils.torch_utils import set_default_torch_dtype

from kvsculpt_vllm.engine.startup.refusals.refusal import UnsupportedFeature
from kvsculpt_vllm.engine.worker.model_rotary import asked_at, probed_positions, rotary_of_layers
from kvsculpt_vllm.sculpt.queries import FUTURE_TOKENS
from kvsculpt_vllm.sculpt.rotary import Rotary

HEADS, HEAD_SIZE, POSITIONS = 3, 32, 256

SCALINGS = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "partial": {"partial_rotary_factor": 0.5},
}


def rotary_module(scaling: str, is_neox_style: bool = True, **extra) -> nn.Module:
    parameters = {"rope_theta": 10000.0, "rope_type": "default", **SCALINGS[scaling], **extra}
    with set_current_vllm_config(VllmConfig()):
        return get_rope(HEAD_SIZE, POSITIONS, is_neox_style, parameters, dtype=torch.float32)


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_moved_queries_are_those_that_the_model_would_have_made_there(scaling, is_neox_style):
    module = rotary_module(scaling, is_neox_style)
    plain = torch.randn(40, HEADS * HEAD_SIZE)

    def rotated_at(positions):
        query, _ = module.forward_native(positions, plain.clone(), plain[:, :HEAD_SIZE].clone())
        return query.view(40, HEADS, HEAD_SIZE)

    origin = torch.randint(0, 128, (40,))
    target = torch.cat([torch.randint(0, module.cos_sin_cache.shape[0], (38,)), origin[38:39], origin[39:] - 1]).abs()
    rotary = Rotary(module.cos_sin_cache, module.rotary_dim, is_neox_style)
    moved = rotary.move(rotated_at(origin), origin, target)
    torch.testing.assert_close(moved, rotated_at(target), rtol=1e-4, atol=1e-4)
    assert rotary.num_positions >= POSITIONS
    if scaling == "yarn":  # the case in which a rotation also changes the length
        assert not torch.allclose(moved.norm(dim=-1), plain.view(40, HEADS, HEAD_SIZE).norm(dim=-1), rtol=1e-2)


def test_no_queries_to_move():
    module = rotary_module("default")
    rotary = Rotary(module.cos_sin_cache, module.rotary_dim, True)
    nowhere = torch.zeros(0, dtype=torch.long)
    assert rotary.move(torch.zeros(0, HEADS, HEAD_SIZE), nowhere, nowhere).shape == (0, HEADS, HEAD_SIZE)


LAYERS, CONTEXT, ORIGINAL = 3, 2048, 512
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,  # of size 16
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HALF, GPT = {"head_dim": 16, "partial_rotary_factor": 0.5}, {"n_embd": 64, "n_head": 4, "n_layer": LAYERS}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
LONGROPE = {
    "original_max_position_embeddings": ORIGINAL,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": ORIGINAL,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    """vLLM's models ask which rank they are on."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('rank') / 'store'}", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.fixture
def make_runner(tmp_path, monkeypatch):
    """Makes what a model runner is to us, with a tiny model of random weights as vLLM builds it."""
    # It would leave transformers' classes changed for all tests after these.
    monkeypatch.setattr(Base, "_decorate_for_torch_compile", lambda self: None)
    # vLLM looks at an architecture's class in a process of its own, which takes longer than the rest.
    monkeypatch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda inspect: inspect())

    def make(architecture: str, changes: dict, context: int = CONTEXT, dtype: str = "float32", impl: str = "auto"):
        config = getattr(transformers, f"{architecture}Config")(**SMALL | changes)
        config.architectures = [f"{architecture}ForCausalLM"]
        config.save_pretrained(tmp_path)
        args = EngineArgs(
            model=str(tmp_path),
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            model_impl=impl,
            dtype=dtype,
            max_model_len=context,
        )
        vllm_config = args.create_engine_config()
        _ROPE_DICT.clear()  # by the model's context alone LongRoPE decides, and that is not in the key
        with set_current_vllm_config(vllm_config), set_default_torch_dtype(vllm_config.model_config.dtype):
            model = initialize_model(vllm_config).eval()
            torch.manual_seed(0)
            for weight in model.parameters():
                # Norms too: one that comes after the rotation would go unseen if it scaled all elements alike.
                nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.3)
            process_weights_after_loading(model, vllm_config.model_config, torch.device("cpu"))
        return SimpleNamespace(
            vllm_config=vllm_config,
            get_model=lambda: model,
            device=torch.device("cpu"),
            maybe_dummy_run_with_lora=lambda *args: nullcontext(),
        )

    return make


def layers_of(runner) -> dict[str, nn.Module]:
    context = runner.vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if isinstance(layer, Attention)}


def rotaries_of_model(runner) -> list[Rotary | None]:
    layers = layers_of(runner)
    assert len(layers) == LAYERS
    return rotary_of_layers(runner, layers)


def transformers_rotation(runner, queries, positions, context: int):
    """Queries (P, heads, D) at `positions` (P,) as transformers' code turns them in a context of so many positions."""
    config = runner.vllm_config.model_config.hf_config
    kind = type(config).__name__.removesuffix("Config")
    module = sys.modules[getattr(transformers, f"{kind}ForCausalLM").__module__]
    rotary = getattr(module, f"{kind}RotaryEmbedding")(config)
    of_type = {"layer_type": config.layer_types[0]} if kind == "Olmo3" else {}
    cos, sin = (angles[:, positions] for angles in rotary(queries, torch.arange(context)[None], **of_type))
    turned, rest = queries.transpose(0, 1)[None].tensor_split([cos.shape[-1]], dim=-1)
    turned = module.apply_rotary_pos_emb(turned, turned, cos, sin)[0]
    return torch.cat([turned, rest], dim=-1)[0].transpose(0, 1)


FOUND = {
    "Llama": ("Llama", {}, CONTEXT, 16),
    "Llama with YaRN": ("Llama", {"rope_parameters": YARN}, CONTEXT, 16),
    "Phi-3, long factors": ("Phi3", LONGROPE, CONTEXT, 16),
    "Phi-3, short factors": ("Phi3", LONGROPE, ORIGINAL, 16),
    "GPT-NeoX": ("GPTNeoX", {"rotary_pct": 0.25}, CONTEXT, 4),
    "GLM": ("Glm", HALF, CONTEXT, 8),  # neighbours paired
    "Phi": ("Phi", HALF, CONTEXT, 8),
    "OLMo 2": ("Olmo2", {}, CONTEXT, 16),
    "OLMo 3": ("Olmo3", {"layer_types": ["full_attention"] * LAYERS}, CONTEXT, 16),
    "StarCoder2": ("Starcoder2", {"bos_token_id": 1}, CONTEXT, 16),
    "Seed-OSS": ("SeedOss", {"head_dim": 16}, CONTEXT, 16),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_model_s_rotary_embedding_is_found_and_turns_as_transformers_code_does(make_runner, name):
    architecture, changes, context, rotary_dim = FOUND[name]
    runner = make_runner(architecture, changes, context)
    queries = torch.randn(4, HEADS, 16)
    origin, target = torch.tensor([0, 3, 200, context - 1]), torch.tensor([context - 1, 9, context - 2, 0])
    here, there = (transformers_rotation(runner, queries, at, context) for at in (origin, target))
    assert not torch.allclose(here, there, atol=0.1)
    for rotary in rotaries_of_model(runner):
        assert (rotary.num_positions, rotary.rotary_dim) == (context, rotary_dim)
        torch.testing.assert_close(rotary.move(here, origin, target), there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_has_the_same_rotary_embeddings_natively_and_by_transformers(make_runner, dtype):
    native, other = (
        rotaries_of_model(make_runner("Llama", {}, 1024, dtype, impl)) for impl in ("vllm", "transformers")
    )
    queries = torch.randn(3, HEADS, 16)
    origin, target = torch.tensor([0, 30, 1023]), torch.tensor([5, 1023 + FUTURE_TOKENS, 0])
    for ours, theirs in zip(native, other, strict=True):
        # As far as any query can ask from: the other table may go on.
        assert theirs.num_positions == 1024 + FUTURE_TOKENS <= ours.num_positions
        one, two = (rotary.move(queries, origin, target) for rotary in (ours, theirs))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5 if dtype == "float32" else 0.05)


def test_text_of_an_mrope_model_is_turned_as_it_is_by_plain_rope(make_runner):
    plain, runner = (make_runner("Llama", changes) for changes in ({}, MROPE))
    assert runner.vllm_config.model_config.uses_mrope and not plain.vllm_config.model_config.uses_mrope
    for one, other in zip(rotaries_of_model(plain), rotaries_of_model(runner), strict=True):
        torch.testing.assert_close(one.cache, other.cache[: len(one.cache)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_whose_queries_do_not_depend_on_the_position_have_none(make_runner, dtype):
    smollm3 = make_runner("SmolLM3", {"no_rope_layers": [1, 0, 1]}, dtype=dtype)
    assert [rotary is None for rotary in rotaries_of_model(smollm3)] == [False, True, False]
    learned = make_runner("GPTBigCode", {**GPT, "n_positions": CONTEXT}, dtype=dtype)
    assert rotaries_of_model(learned) == [None] * LAYERS


REFUSED = {
    "a norm with weights after the rotation": ("HunYuanDenseV1", {"head_dim": 16}, "no rotary embedding was found"),
    "queries that grow with their position": (
        "Ministral3",
        {"head_dim": 16, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
        "no rotary embedding was found",
    ),
    "LongRoPE that switches while a request grows": ("Phi3", LONGROPE, "depends on the longest position"),
    "dynamic RoPE beyond the original context": ("Llama", DYNAMIC, "depends on the longest position"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_rotation_that_cannot_be_had_is_refused_with_the_layer_s_name(make_runner, name):
    architecture, changes, cause = REFUSED[name]
    context = 2 * CONTEXT if changes is DYNAMIC else CONTEXT
    runner = make_runner(architecture, changes, context, impl="transformers")
    with pytest.raises(UnsupportedFeature, match=r"positions of model\.layers\.0\.self_attn\.attn: ") as caught:
        rotaries_of_model(runner)
    assert cause in str(caught.value)
    if cause.startswith("depends"):  # and in a context in which it does not, all is well
        found = rotaries_of_model(make_runner(architecture, changes, ORIGINAL, impl="transformers"))
        assert all(rotary.num_positions >= ORIGINAL for rotary in found)


def test_a_rotary_embedding_under_an_unknown_name_is_refused_and_not_taken_for_none(make_runner):
    runner = make_runner("Llama", {})
    for module in runner.get_model().modules():
        if (rotary := getattr(module, "rotary_emb", None)) is not None:
            module._modules.pop("rotary_emb")
            module.rotary_emb = rotary.forward  # as good as a fused kernel: it turns, and shows nothing
    with pytest.raises(UnsupportedFeature, match=r"positions of model\.layers\.0\.self_attn\.attn: "):
        rotaries_of_model(runner)


def test_a_vision_tower_s_rotary_embedding_is_left_alone(make_runner):
    runner = make_runner("Llama", {}, impl="transformers")
    there, config = runner.get_model().model.rotary_emb, runner.vllm_config.model_config
    tower = nn.Module()
    tower.rotary_emb = type(there)(config.hf_config)
    tower.rotary_emb.forward = lambda x, position_ids: pytest.fail("it knows no positions of text")
    runner.get_model().tower = tower
    runner.get_model()._modules = dict(reversed(runner.get_model()._modules.items()))  # it comes first
    assert all(rotary.rotary_dim == 16 for rotary in rotaries_of_model(runner))


def test_a_model_that_cannot_be_tried_is_refused_with_the_error(make_runner):
    runner = make_runner("Llama", {})
    runner.get_model().forward = None
    with pytest.raises(UnsupportedFeature, match=r"positions of model\.layers\.0\.self_attn\.attn: .*TypeError"):
        rotaries_of_model(runner)


def test_the_model_is_left_as_it_was(make_runner):
    runner = make_runner("Llama", {})
    layers = layers_of(runner)
    _, far = probed_positions(CONTEXT, runner.device)
    once, twice = (asked_at(runner, layers, far) for _ in range(2))
    for name, layer in layers.items():
        assert torch.equal(once[name], twice[name]) and "forward" not in vars(layer)
    assert not any(module._forward_pre_hooks for module in runner.get_model().modules())
