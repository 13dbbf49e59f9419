"""What a model's and an adapter's weights are, so that what was made with others is never taken for theirs.

Names do not tell: a directory may hold another model tomorrow. Digests are the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SAMPLE_BYTES = 4096
"""Bytes that are read at each end of every tensor: training changes nearly every number of a tensor it changes."""
SAMPLES = 256
"""Places at which a file is read whose format does not say where its tensors are."""

_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


class UnknownWeights(ValueError):
    """The files that weights come from are not on this machine, or cannot be read."""


def model_identity(vllm_config: VllmConfig) -> str:
    """A digest of all of a model that its keys and values depend on: weights, configuration, data types, and how its
    layers and heads are spread over ranks.

    Raises:
        UnknownWeights: its files cannot be found here.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    config = {key: value for key, value in model.hf_config.to_dict().items() if key not in _SAYS_NOTHING}
    load_format = str(vllm_config.load_config.load_format)
    parts = [
        config,
        str(model.dtype),
        str(vllm_config.cache_config.cache_dtype),
        model.quantization,
        model.quantization_config,
        # Some rotary embeddings turn by the longest context: those of LongRoPE, by whether it is a long one.
        model.max_model_len if "longrope" in json.dumps(config, default=str).lower() else None,
        [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
        # Dummy weights are drawn from the seed.
        ["dummy", model.seed] if load_format == "dummy" else weights_digest(_directory_of(vllm_config)),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


_SAYS_NOTHING = {"_name_or_path", "transformers_version"}


def weights_digest(path: Path) -> str:
    """A digest of the weights in a directory, or of one file of them: of every tensor's place, kind and ends.

    Raises:
        UnknownWeights: there are none, or they cannot be read.
    """
    try:
        files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in _WEIGHTS)
        digests = [[file.name if file != path else "", _file_digest(file)] for file in files]
    except OSError as error:
        raise UnknownWeights(f"{path} cannot be read: {error}") from None
    if not digests:
        raise UnknownWeights(f"there are no weights in {path}")
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def adapter_identity(path: Path) -> str:
    """A digest of a LoRA adapter's weights, and of its configuration, which says how much they count for.

    Raises:
        UnknownWeights: it cannot be read here.
    """
    config = path / "adapter_config.json"
    try:
        parts = [weights_digest(path), hashlib.sha256(config.read_bytes()).hexdigest()]
    except OSError as error:
        raise UnknownWeights(f"{config} cannot be read: {error}") from None
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _directory_of(vllm_config: VllmConfig) -> Path:
    """Where the model's weights are. vLLM has loaded them, so that a model of Hugging Face's hub is in its cache."""
    from huggingface_hub import snapshot_download

    model = vllm_config.model_config
    if (path := Path(model.model)).exists():
        return path
    try:
        return Path(
            snapshot_download(
                model.model,
                revision=model.revision,
                cache_dir=vllm_config.load_config.download_dir,
                local_files_only=True,
            )
        )
    except (OSError, ValueError) as error:
        raise UnknownWeights(f"the files of {model.model} are not found here: {error}") from None


def _file_digest(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as opened:
        for start in _places(file, size):
            opened.seek(start)
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _places(file: Path, size: int) -> list[int]:
    """Where a file is read: all of a small one, both ends of every tensor, or evenly spread places."""
    if size <= SAMPLES * SAMPLE_BYTES:
        return list(range(0, size, SAMPLE_BYTES))
    if file.suffix != ".safetensors":
        return [i * (size - SAMPLE_BYTES) // (SAMPLES - 1) for i in range(SAMPLES)]
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    places = list(range(0, 8 + length, SAMPLE_BYTES))
    for name in sorted(header.keys() - {"__metadata__"}):
        first, end = (8 + length + offset for offset in header[name]["data_offsets"])
        places += [first, max(first, end - SAMPLE_BYTES)]
    return places
