"""What the evaluation's tests share."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def tiny_llama():
    """Makes a tiny model, the same one every time it is asked for."""

    def make(
        layers: int, heads: int, kv_heads: int, vocabulary: int, positions: int, **others: Any
    ) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=positions,
            initializer_range=0.3,  # attention that is far from even, so that it matters what is kept
            **others,
        )
        return LlamaForCausalLM(config).eval()

    return make
