"""The content of a stored segment: a safetensors file, with a checksum over all of it.

The library writes and reads it. A file's metadata has SHA-256 of the file, whose digits count as zeros in it: so a
flipped bit is found wherever it is, also in what the file says about itself.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kvsculpt_vllm.store.names import StoredName
from kvsculpt_vllm.store.unusable import Reason, Unusable

FORMAT = 1

LONGEST_HEADER = 1 << 20
"""Bytes; ours have about a thousand. What claims more is not read."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)
"""That entries may have."""

_SIGNED = b'"sha256":"'
_DIGITS = 64


@dataclass
class StoredSegment:
    """What one rank keeps of a segment."""

    name: StoredName
    rank: int
    ranks: int
    pages: Tensor  # (L, H) int32: pages of each layer and KV head of this rank
    keys: Tensor  # (entries, D) in the cache's dtype; entries in the order of pages, layers outermost
    values: Tensor  # (entries, D), likewise
    about: dict[str, str]  # model, method, settings, versions: for people, and for checks of the engine

    @property
    def path(self) -> str:
        """Relative to the store."""
        return self.name.path(self.rank, self.ranks)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors; its file has about a thousand more."""
        return self.keys.nbytes + self.values.nbytes + self.pages.nbytes


def encode(segment: StoredSegment) -> bytes:
    """Write a segment as the bytes of a file.

    Raises:
        ValueError: the tensors do not fit one another, or have a dtype that no file can hold.
    """
    if wrong := _misfit(segment.pages, segment.keys, segment.values):
        raise ValueError(f"cannot be stored: {wrong}")
    if segment.keys.dtype not in DTYPES:
        raise ValueError(f"entries are {segment.keys.dtype}, allowed: {', '.join(map(str, DTYPES))}")
    tensors = {"keys": segment.keys, "values": segment.values, "pages": segment.pages}
    metadata = {
        "format": str(FORMAT),
        "name": segment.path,
        "about": json.dumps(segment.about),
        "sha256": "0" * _DIGITS,
    }
    data = bytearray(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata))
    if (end := header_end(data[:8])) == 8:
        raise ValueError(f"`about` is too long: the header may have {LONGEST_HEADER} bytes")
    data[_digits_of(data, end)] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def decode(data: bytes | bytearray | memoryview, name: StoredName, rank: int, ranks: int) -> StoredSegment:
    """Read the bytes of the file that has this name.

    Raises:
        Unusable: they are not what was written under this name.
    """
    path, whole = name.path(rank, ranks), bytearray(data)
    end = header_end(whole[:8])
    header = read_header(bytes(whole[:end]), path)
    if len(whole) != header.file_bytes:
        reason = Reason.CUT_OFF if len(whole) < header.file_bytes else Reason.ALTERED
        raise Unusable(reason, f"{path} has {len(whole)} bytes instead of {header.file_bytes}")
    digits = _digits_of(whole, end)
    digest = bytes(whole[digits])
    whole[digits] = b"0" * _DIGITS
    if hashlib.sha256(whole).hexdigest().encode() != digest:
        raise Unusable(Reason.ALTERED, f"{path} was altered: its checksum is not the one that it was written with")
    if header.path != path:
        raise Unusable(Reason.FOREIGN, f"{path} holds another segment, {header.path}")
    try:
        tensors = load(bytes(whole))
        pages, keys, values = (tensors.pop(label) for label in ("pages", "keys", "values"))
    except (SafetensorError, KeyError) as error:
        raise Unusable(Reason.ALTERED, f"{path} was altered: {error!r:.200}") from None
    if wrong := _misfit(pages, keys, values):
        raise Unusable(Reason.OTHER_SHAPE, f"{path}: {wrong}")
    return StoredSegment(name, rank, ranks, pages, keys, values, header.about)


@dataclass(frozen=True)
class Header:
    """What a file says about itself, which only its checksum proves."""

    path: str  # that it was written under
    about: dict[str, str]
    file_bytes: int


def read_header(beginning: bytes, path: str) -> Header:
    """Read the header from the beginning of the file `path`; `beginning` has all of it unless the file is cut off.

    Raises:
        Unusable: there is no header of ours.
    """
    length = int.from_bytes(beginning[:8], "little")
    if len(beginning) < 8:
        raise Unusable(Reason.CUT_OFF, f"{path} has only {len(beginning)} bytes")
    raw = beginning[8 : 8 + length]
    if length > LONGEST_HEADER or raw[:2] != b'{"'[: len(raw)]:
        raise Unusable(Reason.FOREIGN, f"{path} was not written by kvsculpt: it does not begin as its files do")
    if len(raw) < length:
        raise Unusable(Reason.CUT_OFF, f"{path} ends within its header")
    try:
        tensors: dict[str, Any] = json.loads(raw)
        metadata = tensors.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not metadata.keys() >= {"format", "name", "about", "sha256"}:
            raise Unusable(Reason.FOREIGN, f"{path} was not written by kvsculpt: it does not say what ours say")
        version = int(metadata["format"])
        if version > FORMAT:
            raise Unusable(Reason.NEWER, f"{path} has format {version}, this version of kvsculpt reads {FORMAT}")
        if version != FORMAT:
            raise Unusable(Reason.FOREIGN, f"{path} has format {version}, which there never was")
        about = {str(key): str(value) for key, value in json.loads(metadata["about"]).items()}
        end = max(int(tensor["data_offsets"][1]) for tensor in tensors.values())
        _digits_of(bytearray(beginning), len(beginning))
        return Header(str(metadata["name"]), about, 8 + length + end)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Unusable(Reason.ALTERED, f"{path} was altered: its header makes no sense ({error!r:.200})") from None


def header_end(beginning: bytes | bytearray) -> int:
    """How many bytes `read_header` needs, by the first 8; of what is no file of ours, no more than these."""
    end = 8 + int.from_bytes(beginning[:8], "little")
    return end if end <= 8 + LONGEST_HEADER else 8


def _digits_of(data: bytearray, header: int) -> slice:
    """Where the checksum's digits are, in a header that ends at byte `header`.

    Raises:
        ValueError: there is none.
    """
    first = data.index(_SIGNED, 8, header) + len(_SIGNED)  # in texts the quotes would be escaped
    if first + _DIGITS > header:
        raise ValueError("a checksum that is too short")
    return slice(first, first + _DIGITS)


def _misfit(pages: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """What does not fit in the shapes of a segment's tensors; None if all does."""
    if pages.dtype != torch.int32 or pages.ndim != 2 or not pages.numel():
        return f"pages are {pages.dtype} {tuple(pages.shape)}, expected: int32 (layers, KV heads)"
    if keys.ndim != 2 or keys.shape != values.shape or keys.dtype != values.dtype:
        return f"keys are {keys.dtype} {tuple(keys.shape)}, values {values.dtype} {tuple(values.shape)}"
    if int(pages.min()) < 0:
        return "a head has fewer than 0 pages"
    total = int(pages.sum())
    if not total or not keys.numel() or len(keys) % total:
        return f"{len(keys)} entries are no whole number for each of {total} pages"
    return None
