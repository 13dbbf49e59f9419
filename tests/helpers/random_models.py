"""Models with random weights, small enough for a test."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel


def save(model: PreTrainedModel, path: Path, tokenizer: Path) -> Path:
    """Write a model to `path`, with the tokenizer of the one in the folder `tokenizer`."""
    model.eval().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, path)
    return path
