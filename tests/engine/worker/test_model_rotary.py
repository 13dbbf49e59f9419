"""Moved queries against vLLM's own rotary modules at the target positions."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from kvsculpt_vllm.engine.worker.model_rotary import rotary_of_layers
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


class Attention(nn.Module):
    """As models are built: the rotary embedding beside the attention layer."""

    def __init__(self, rotary_emb: nn.Module | None) -> None:
        super().__init__()
        self.attn = nn.Identity()
        self.rotary_emb = rotary_emb


def test_layers_find_their_own_rotary_embedding_and_none_that_would_be_wrong():
    one, other = rotary_module("default"), rotary_module("llama3")
    multi = rotary_module("default", mrope_section=[8, 4, 4])
    model = nn.ModuleList(Attention(rotary) for rotary in (one, other, multi, None, one))
    layers = [module.attn for module in model]
    config = SimpleNamespace(no_rope_layers=[1, 1, 1, 1, 0])  # 0: the last layer has none
    rotaries = rotary_of_layers(model, layers, config)
    assert rotaries[2:] == [None, None, None]
    assert rotaries[0].cache is one.cos_sin_cache and rotaries[1].cache is other.cos_sin_cache
    assert rotary_of_layers(model, layers, SimpleNamespace())[4].cache is one.cos_sin_cache
