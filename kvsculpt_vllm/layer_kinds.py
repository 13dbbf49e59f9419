"""Which layers of a model see everything, and which a window of the last tokens: only the former are compressed."""

from __future__ import annotations

from typing import Any

FULL, WINDOW = "full_attention", "sliding_attention"
"""Kinds of layers, as transformers' configurations name them."""


def kinds_of(text_config: Any) -> list[str]:
    """Read the kind of every layer from a transformers text configuration; one that tells none means full attention."""
    return list(getattr(text_config, "layer_types", None) or [FULL] * text_config.num_hidden_layers)


def full_layers(text_config: Any) -> list[int]:
    """Which layers see everything: those that a calibration has curves of, in this order."""
    return [layer for layer, kind in enumerate(kinds_of(text_config)) if kind != WINDOW]
