"""Which calibration file the setting `calibration` means for the model, found when the engine is configured."""

from __future__ import annotations

from vllm.config import ModelConfig

from kvsculpt_vllm.calibration_file import MEASURE, NONE, CalibrationError, ModelShape, find
from kvsculpt_vllm.config import CompressionConfig, ConfigError, WrongSetting, allowed, flag
from kvsculpt_vllm.engine.shared.groups import compressed_layers
from kvsculpt_vllm.engine.startup.measured_calibration import measure


def resolved(config: CompressionConfig, model: ModelConfig) -> CompressionConfig:
    """The configuration with the path of the file that its `calibration` means for the model, or with `none`. The
    file is made now if it is to be measured and is not there.

    Raises:
        ConfigError: that file does not fit the model, or cannot be made.
    """
    kv_heads = model.get_total_num_kv_heads()
    group = model.model_arch_config.total_num_attention_heads // kv_heads
    shape = ModelShape(len(compressed_layers(model)), kv_heads, group, model.get_head_size())
    try:
        path = find(config.calibration, model.model, shape)
        if path is None and config.calibration == MEASURE:
            path = measure(model)
    except CalibrationError as error:
        cure = f"{allowed('calibration')} ({error})"
        raise ConfigError([WrongSetting(flag("calibration"), config.calibration, cure)]) from None
    return config.model_copy(update={"calibration": NONE if path is None else str(path)})
