"""The file that `kvsculpt calibrate` writes for a model, and where a server finds it."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Base64UrlBytes, BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvsculpt_vllm.sculpt.foretold import QueryMaps
from kvsculpt_vllm.sculpt.loss_curves import LossCurves

FILE = "kvsculpt-calibration.json"
"""The name of a calibration file in a model's directory. It is no safetensors file: vLLM would take it for weights."""

SHIPPED = Path(__file__).parent / "calibrations"
"""The folder of the calibrations that come with the package, `<name of the model>.json`."""

AUTO, NONE, MEASURE = "auto", "none", "measure"
"""What the setting may be besides a path. `measure` is `auto`, and where that finds nothing the server's first start
writes a file, where `auto` finds it, too (`measured_place`)."""


class ModelShape(NamedTuple):
    """What a model and its calibration must have in common."""

    num_layers: int  # those that are compressed
    num_kv_heads: int  # of each of them
    group: int  # query heads of each KV head
    head_size: int


class CalibrationError(ValueError):
    """A calibration cannot be used; the message says why."""


class StoredMaps(BaseModel):
    """Linear maps of some heads' queries (see `foretold.QueryMaps`): what they add to a query, in 8 bits and a scale
    for each number that comes out. Fewer numbers of more bits, a product of two narrow matrices, do not do
    (benchmarks/LOG.md).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads: tuple[tuple[int, int], ...]  # N layers and KV heads, ascending
    group: int = Field(ge=1)  # G query heads of each
    head_size: int = Field(ge=1)  # D
    wanted: tuple[Annotated[float, Field(ge=0, le=1)], ...]  # N shares of a head's entries, see `foretold.QueryMaps`
    steps: Base64UrlBytes  # (N, G, D + 1, D) int8
    scales: Base64UrlBytes  # (N, G, 1, D) float16, little-endian: what a step is worth

    @model_validator(mode="after")
    def _consistent(self) -> StoredMaps:
        for name, given, each in (("steps", self.steps, self.head_size + 1), ("scales", self.scales, 2)):
            shape = (len(self.heads), self.group, self.head_size)
            if len(given) != math.prod(shape) * each:
                raise ValueError(f"{name}: {len(given)} bytes given, {shape} of {each} bytes expected")
        if len(self.wanted) != len(self.heads):
            raise ValueError(f"wanted: {len(self.wanted)} shares given for {len(self.heads)} heads")
        if list(self.heads) != sorted(set(self.heads)) or min(map(min, self.heads), default=0) < 0:
            raise ValueError("heads do not ascend")
        if not np.isfinite(self._scales).all():
            raise ValueError("scales are not all finite")
        return self

    @classmethod
    def of(cls, heads: Sequence[tuple[int, int]], maps: np.ndarray, wanted: Sequence[float]) -> StoredMaps:
        """Store the `maps` (N, G, D + 1, D) of the `heads`, layers and KV heads, of whose entries shares are `wanted`.

        Raises:
            ValueError: a number that is too large.
        """
        added = maps - np.eye(*maps.shape[2:])
        with np.errstate(over="ignore"):  # it is refused as not finite
            scales = np.maximum(np.abs(added).max(axis=2, keepdims=True) / 127, 1e-6).astype("<f2")
        steps = np.rint(added / scales.astype(np.float64)).clip(-127, 127).astype(np.int8)
        stored = {name: base64.urlsafe_b64encode(x.tobytes()) for name, x in (("steps", steps), ("scales", scales))}
        shares = tuple(float(f"{share:.4g}") for share in wanted)
        return cls(heads=tuple(heads), group=maps.shape[1], head_size=maps.shape[3], wanted=shares, **stored)

    def part(self, layers: Sequence[int], kv_heads: Sequence[int], share: int = 0, shares: int = 1) -> QueryMaps:
        """Take the maps of some heads, numbered as they are in `layers` x `kv_heads`. Of each one's query heads the
        `share`-th of so many equal `shares`.
        """
        places = {head: place for place, head in enumerate(self.heads)}
        every = [(layer, head) for layer in layers for head in kv_heads]
        numbers = [number for number, head in enumerate(every) if head in places]
        each = self.group // shares
        own = [places[every[number]] for number in numbers], slice(share * each, (share + 1) * each)
        steps = np.frombuffer(self.steps, dtype=np.int8).reshape(len(self.heads), self.group, -1, self.head_size)
        added = steps[own].astype(np.float32) * self._scales[own].astype(np.float32)
        maps = torch.from_numpy(added + np.eye(*added.shape[2:], dtype=np.float32))
        return QueryMaps(tuple(numbers), maps, tuple(self.wanted[place] for place in own[0]))

    @property
    def _scales(self) -> np.ndarray:
        return np.frombuffer(self.scales, dtype="<f2").reshape(len(self.heads), self.group, 1, self.head_size)


class CalibrationFile(BaseModel):
    """The content of a calibration file: what each KV head of a model loses at some fractions of its span's pages."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    model: str  # the name of the directory it was measured on
    num_layers: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    context: int  # tokens of each context
    texts: dict[str, int]  # what was read, and how many contexts of it
    second_weight: float | None = None  # of the second readings; None in older files, which hold the sum of losses
    fractions: tuple[float, ...]  # of a span's pages, ascending, the last one 1
    losses: tuple[tuple[tuple[float, ...], ...], ...]  # [layer][KV head][fraction], see `calibrate.calibrate`
    # The same of segments that others follow. None in older files, which have measured the others only.
    followed_losses: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    # Entries are ranked by the attention that they receive to this power. None in older files: the method's own.
    power: Literal[1, 2] | None = None
    # Of the heads that copy. None in older files, and if no head does.
    query_maps: StoredMaps | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CalibrationFile:
        shape = (self.num_layers, self.num_kv_heads, len(self.fractions))
        for name, curves in (("losses", self.losses), ("followed_losses", self.followed_losses or self.losses)):
            if len(curves) != self.num_layers or any(
                len(heads) != self.num_kv_heads or any(len(losses) != len(self.fractions) for losses in heads)
                for heads in curves
            ):
                raise ValueError(f"{name} are not {shape} numbers")
        ascending = all(a < b for a, b in zip((0.0, *self.fractions), self.fractions, strict=False))
        if len(self.fractions) < 2 or not ascending or self.fractions[-1] != 1:
            raise ValueError("fractions do not ascend to 1")
        for layer, head in self.query_maps.heads if self.query_maps else ():
            if layer >= self.num_layers or head >= self.num_kv_heads:
                raise ValueError(f"query_maps are of layer {layer}, KV head {head}, which the model does not have")
        return self

    @property
    def digest(self) -> str:
        """A hash by which result files tell one calibration from another."""
        return hashlib.sha256(self._json().encode()).hexdigest()[:12]

    def part(self, layers: list[int], kv_heads: list[int], share: int = 0, shares: int = 1) -> LossCurves:
        """Take the curves of the layers in `layers` and of the KV heads in `kv_heads` of each; layers are outermost. A
        rank that has only some of a KV head's query heads has the `share`-th of so many equal `shares`.
        """

        def chosen(losses: tuple[tuple[tuple[float, ...], ...], ...]) -> np.ndarray:
            return np.array(losses, dtype=np.float64)[np.ix_(layers, kv_heads)].reshape(-1, len(self.fractions))

        followed = None if self.followed_losses is None else chosen(self.followed_losses)
        maps = None if self.query_maps is None else self.query_maps.part(layers, kv_heads, share, shares)
        return LossCurves(self.fractions, chosen(self.losses), followed, self.power, maps)

    def misfit(self, shape: ModelShape) -> str | None:
        """Say why the file cannot be of a model of that shape; None if it can."""
        own = self.num_layers, self.num_kv_heads
        if own != shape[:2]:
            return (
                f"is of a model with {own[0]} layers of {own[1]} KV heads, this one has {shape.num_layers} of "
                f"{shape.num_kv_heads}"
            )
        maps = self.query_maps
        if maps is not None and (maps.group, maps.head_size) != shape[2:]:
            return (
                f"has maps of {maps.group} queries of size {maps.head_size} for each KV head, this model has "
                f"{shape.group} of size {shape.head_size}"
            )
        return None

    @property
    def whole(self) -> LossCurves:
        """The curves of all heads of the model, layers outermost."""
        return self.part(list(range(self.num_layers)), list(range(self.num_kv_heads)))

    def write(self, path: Path) -> None:
        """Write the file; it appears complete or not at all.

        Raises:
            OSError: it cannot be written.
        """
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self._json() + "\n")
        partial.replace(path)

    def _json(self) -> str:
        return self.model_dump_json(exclude_none=True)


def read(path: Path) -> CalibrationFile:
    """Read a calibration file.

    Raises:
        CalibrationError: the file cannot be read, or `kvsculpt calibrate` has not written it.
    """
    try:
        return CalibrationFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CalibrationError(f"{path} was not written by `kvsculpt calibrate`: {where} {first['msg']}") from None


def find(setting: str, model: str, shape: ModelShape) -> Path | None:
    """Find the file that the setting `calibration` means for a model (a directory, or a name as on Hugging Face).

    `none` means no file, and a path means that file. `auto` and `measure` mean the file in the model's directory, else
    the one that a server has measured, else the one that comes with the package for a model of that name and shape,
    else none.

    Raises:
        CalibrationError: the file that was named, or is in the model's directory, does not fit the model.
    """
    if setting == NONE:
        return None
    directory, name = _place(model)
    beside, shipped = directory / FILE if directory else None, SHIPPED / f"{name}.json"
    if setting not in (AUTO, MEASURE):
        path = Path(setting)
    elif beside is not None and beside.is_file():
        path = beside
    elif (measured := measured_place(model)).is_file():
        path = measured
    else:
        return shipped if shipped.is_file() and read(shipped).misfit(shape) is None else None
    if (misfit := read(path).misfit(shape)) is not None:
        raise CalibrationError(f"{path} {misfit}")
    return path.resolve()


def measured_place(model: str) -> Path:
    """Where a server keeps what it has measured of a model: in the user's cache, as models are often not its own to
    write to. Models of one name are told apart by where they are, or by their whole name on Hugging Face.
    """
    directory, name = _place(model)
    digest = hashlib.sha256(str(directory or model).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "kvsculpt-vllm" / "calibrations" / f"{name}-{digest}.json"


def _place(model: str) -> tuple[Path | None, str]:
    """Find the model's directory (None if `model` is neither a directory nor a file in one), and the model's name."""
    path = Path(model).resolve()
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        return None, path.name
    # vLLM offline: Hugging Face's cache, …/models--organisation--name/snapshots/revision
    in_cache = path.parent.name == "snapshots"
    return path, path.parent.parent.name.rpartition("--")[2] if in_cache else path.name
