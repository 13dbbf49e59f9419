"""The model's calibration: found when the engine is configured, read by each worker for its own layers and heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm.config import ModelConfig
from vllm.model_executor.models.utils import extract_layer_index

from kvsculpt_vllm.calibration import NONE, CalibrationError, find, read
from kvsculpt_vllm.config import CompressionConfig, ConfigError, Problem, allowed, flag
from kvsculpt_vllm.sculpt.calibration import Calibration


def resolved(config: CompressionConfig, model: ModelConfig) -> CompressionConfig:
    """The configuration with the path of the file that its `calibration` means for the model, or with `none`.

    Raises:
        ConfigError: that file does not fit the model.
    """
    num_layers = model.hf_text_config.num_hidden_layers
    try:
        path = find(config.calibration, model.model, num_layers, model.get_total_num_kv_heads())
    except CalibrationError as error:
        cure = f"{allowed('calibration')} ({error})"
        raise ConfigError([Problem(flag("calibration"), config.calibration, cure)]) from None
    return config.model_copy(update={"calibration": NONE if path is None else str(path)})


def of_rank(
    config: CompressionConfig, layer_names: Sequence[str], num_kv_heads: int, rank: int, world_size: int
) -> Calibration | None:
    """What a resolved configuration's file says of the layers and the KV heads that one tensor parallel rank has.

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
    return file.part([extract_layer_index(name) for name in layer_names], list(range(first, first + num_kv_heads)))
