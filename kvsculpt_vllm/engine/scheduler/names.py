"""What the names of segments begin with: the model, its calibration, an adapter.

Without a store names are this engine's only, and what it was started with tells them apart. In a store they say what
weights are, whatever the files are called.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from kvsculpt_vllm.calibration_file import AUTO, NONE
from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.identity import UnknownWeights, adapter_identity, model_identity
from kvsculpt_vllm.engine.shared.stores import NO_STORE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

logger = init_logger("vllm.kvsculpt")


class Names:
    """The parts of a name that no request changes, and those of adapters."""

    def __init__(self, vllm_config: VllmConfig, config: CompressionConfig) -> None:
        """
        Raises:
            UnknownWeights: there is a store, and the model's files cannot be found here.
        """
        self._lasting = config.store != NO_STORE
        model = vllm_config.model_config
        self.model = model_identity(vllm_config) if self._lasting else f"{model.model} {model.revision} {model.dtype}"
        self.calibration = config.calibration
        if config.calibration not in (NONE, AUTO):
            self.calibration = hashlib.sha256(Path(config.calibration).read_bytes()).hexdigest()
        self._adapters: dict[tuple[str, int, float], Any] = {}

    def adapter(self, lora: LoRARequest) -> Any:
        """What an adapter is called: one that is loaded again under its number may have changed."""
        if not self._lasting:
            return [lora.lora_name, lora.lora_int_id, lora.lora_path]
        known = self._known(lora)
        if known not in self._adapters:
            try:
                self._adapters[known] = adapter_identity(Path(lora.lora_path))
            except UnknownWeights as error:
                logger.warning("kvsculpt: nothing of the adapter %s is kept in the store: %s", lora.lora_name, error)
                self._adapters[known] = [lora.lora_name, lora.lora_int_id, secrets.token_hex(16)]
        return self._adapters[known]

    def last(self, lora: LoRARequest | None) -> bool:
        """Whether names that begin with an adapter mean the same to other servers."""
        return self._lasting and (lora is None or isinstance(self.adapter(lora), str))

    @staticmethod
    def _known(lora: LoRARequest) -> tuple[str, int, float]:
        """What tells an adapter that was loaded: the same path and number may hold another one tomorrow."""
        try:
            changed = max((file.stat().st_mtime for file in Path(lora.lora_path).iterdir()), default=0.0)
        except OSError:
            changed = 0.0
        return lora.lora_path, lora.lora_int_id, changed
