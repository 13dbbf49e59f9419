"""The loss curves of the layers and KV heads that one worker has, out of the model's calibration file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm.model_executor.models.utils import extract_layer_index

from kvsculpt_vllm.calibration_file import NONE, CalibrationError, read
from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.sculpt.loss_curves import LossCurves


def curves_of_rank(
    config: CompressionConfig,
    layer_names: Sequence[str],
    num_kv_heads: int,
    rank: int,
    world_size: int,
    compressed: Sequence[int] | None = None,
) -> LossCurves | None:
    """What a resolved configuration's file says of the layers and the KV heads that one tensor parallel rank has. It
    knows the layers that are `compressed`, by their numbers in the model; None means all.

    vLLM gives each rank `num_kv_heads` consecutive ones; where ranks outnumber them several have the same one.
    """
    if config.calibration == NONE:
        return None
    try:
        file = read(Path(config.calibration))
    except CalibrationError as error:
        raise CalibrationError(f"{error}; with several machines it must be at the same path on all of them") from None
    copies = max(1, world_size // file.num_kv_heads)
    first = rank // copies * num_kv_heads
    numbers = {layer: i for i, layer in enumerate(range(file.num_layers) if compressed is None else compressed)}
    layers = [numbers[extract_layer_index(name)] for name in layer_names]
    return file.part(layers, list(range(first, first + num_kv_heads)), rank % copies, copies)
