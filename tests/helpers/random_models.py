"""Models with random weights, small enough for a test."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel

SMALL = {
    "vocab_size": 4032,
    "hidden_size": 192,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "initializer_range": 0.15,
}
"""Sizes of a configuration with which what is attended to decides. It knows a twelfth of a real tokenizer's tokens: a
product with all of them would take longer than all else."""


def save(model: PreTrainedModel, path: Path, tokenizer: Path) -> Path:
    """Write a model to `path`, with the tokenizer of the one in the folder `tokenizer`."""
    model.eval().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, path)
    return path
