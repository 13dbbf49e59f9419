"""`--kv-compression-calibration measure`: a server's first start calibrates its model, later ones find the file."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from filelock import FileLock
from huggingface_hub import snapshot_download
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from kvsculpt_vllm.calibration_file import CalibrationError, measured_place

logger = init_logger("vllm.kvsculpt")

TOKENS, CONTEXTS = 2048, 4
"""What is read: so many contexts of so many tokens, each with three times as many behind it."""


def measure(model: ModelConfig) -> Path:
    """Calibrate the model, which takes minutes on a CPU, and return the file. Of several servers that start at once one
    does it, and the others wait.

    It is done in a process of its own: it needs the model in transformers, in float32, and what that takes is given
    back before vLLM asks how much memory there is. Nor may a process that vLLM forks have touched a GPU.

    Raises:
        CalibrationError: the model cannot be calibrated.
    """
    directory, path = _directory(model), measured_place(model.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():
            return path
        logger.info("KV compression: calibrating %s, once; the file will be %s", model.model, path)
        positions = getattr(model.hf_text_config, "max_position_embeddings", 4 * TOKENS)
        context = ["--context", str(min(TOKENS, positions // 4)), "--num-contexts", str(CONTEXTS), "--effort", "fast"]
        # Python's source alone would choose the other one, with which prose loses up to twice as much.
        context += ["--ranking", "2"]
        where = ["--device", current_platform.device_type, "--out", str(path)]
        command = [sys.executable, "-m", "kvsculpt_vllm", "calibrate", "--model", str(directory), *context, *where]
        # Its progress bar, and what it says where it fails, go to the terminal.
        status = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if status:
        raise CalibrationError(
            f"{model.model} cannot be calibrated, as said above; the command was {shlex.join(command)}"
        )
    return path


def _directory(model: ModelConfig) -> Path:
    """The model's files, fetched if they are not here, as vLLM would."""
    path = Path(model.model)
    if path.is_dir():
        return path
    if path.is_file():
        raise CalibrationError(f"{path} is a single file, and transformers needs a model's directory")
    try:
        return Path(snapshot_download(model.model, revision=model.revision))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{model.model} cannot be fetched: {error}") from error
