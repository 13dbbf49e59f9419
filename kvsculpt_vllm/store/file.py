"""The content of a stored segment: a safetensors file, with a checksum over all of it.

    8 bytes: length n of the header | n bytes: header, JSON | data: keys, values, pages

The header begins with the checksum, whose digits count as zeros in it: SHA-256 of header and data. So a flipped bit is
found wherever it is, also in what the file says about itself. Any reader of safetensors can open the file. It is
written and parsed here because the library's functions copy the tensors once more, and check no content.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvsculpt_vllm.store.names import StoredName
from kvsculpt_vllm.store.unusable import Reason, Unusable

FORMAT = 1

LONGEST_HEADER = 1 << 20
"""Bytes; ours have about a thousand. What claims more is not read."""

_BEGINNING = b'{"__metadata__":{"sha256":"'
_DIGITS = slice(len(_BEGINNING), len(_BEGINNING) + 64)
_ZEROS = b"0" * 64
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


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
    """Write a segment as the bytes of a file. They are the only copy that is made of contiguous tensors on the CPU.

    Raises:
        ValueError: the tensors do not fit one another, or have a dtype that no file can hold.
    """
    if wrong := _misfit(segment.pages, segment.keys, segment.values):
        raise ValueError(f"cannot be stored: {wrong}")
    if segment.keys.dtype not in _NAMES:
        raise ValueError(f"entries are {segment.keys.dtype}, allowed: {', '.join(map(str, _NAMES))}")
    parts = [_bytes_of(tensor) for tensor in (segment.keys, segment.values, segment.pages)]
    header = _header(segment)
    digest = hashlib.sha256(header)
    for part in parts:
        digest.update(part)
    header[_DIGITS] = digest.hexdigest().encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *parts])


def decode(data: bytes | bytearray | memoryview, name: StoredName, rank: int, ranks: int) -> StoredSegment:
    """Read the bytes of the file that has this name. The tensors share the memory of a writable `data`.

    Raises:
        Unusable: they are not what was written under this name.
    """
    path, whole = name.path(rank, ranks), memoryview(data).cast("B")
    header = read_header(bytes(whole[: header_end(bytes(whole[:8]))]), path)
    if whole.nbytes != header.file_bytes:
        short = whole.nbytes < header.file_bytes
        reason = Reason.CUT_OFF if short else Reason.ALTERED
        raise Unusable(reason, f"{path} has {whole.nbytes} bytes instead of {header.file_bytes}")
    begin = header.file_bytes - header.data_bytes
    digest = hashlib.sha256(header.hashed)
    digest.update(whole[begin:])
    if digest.hexdigest().encode() != header.digest:
        raise Unusable(Reason.ALTERED, f"{path} was altered: its checksum is not the one that it was written with")
    if header.path != path:
        raise Unusable(Reason.FOREIGN, f"{path} holds another segment, {header.path}")
    keys, values, pages = (_tensor(whole, begin, part) for part in header.parts)
    if wrong := _misfit(pages, keys, values):
        raise Unusable(Reason.OTHER_SHAPE, f"{path}: {wrong}")
    return StoredSegment(name, rank, ranks, pages, keys, values, header.about)


@dataclass(frozen=True)
class Part:
    """A tensor in the data of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int  # byte, from the beginning of the data
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself, which only its checksum proves."""

    hashed: bytes  # the header, with zeros for the digits of the checksum
    digest: bytes
    path: str  # that it was written under
    about: dict[str, str]
    parts: list[Part]  # keys, values, pages
    file_bytes: int
    data_bytes: int


def read_header(beginning: bytes, path: str) -> Header:
    """Read the header from the beginning of the file `path`; `beginning` has all of it unless the file is cut off.

    Raises:
        Unusable: there is no header of ours.
    """
    if len(beginning) < 8:
        raise Unusable(Reason.CUT_OFF, f"{path} has only {len(beginning)} bytes")
    length = int.from_bytes(beginning[:8], "little")
    if not len(_BEGINNING) + 64 <= length <= LONGEST_HEADER:
        raise Unusable(Reason.FOREIGN, f"{path} was not written by kvsculpt: it does not begin as its files do")
    raw = beginning[8 : 8 + length]
    if not raw.startswith(_BEGINNING[: len(raw)]):
        raise Unusable(Reason.FOREIGN, f"{path} was not written by kvsculpt: its header does not begin as ours do")
    if len(raw) < length:
        raise Unusable(Reason.CUT_OFF, f"{path} ends within its header")
    try:
        return _parse(raw, length, path)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Unusable(Reason.ALTERED, f"{path} was altered: its header makes no sense ({error!r:.200})") from None


def header_end(beginning: bytes) -> int:
    """How many bytes `read_header` needs, by the first 8; of what is no file of ours, no more than these."""
    end = 8 + int.from_bytes(beginning[:8], "little")
    return end if end <= 8 + LONGEST_HEADER else 8


def _parse(raw: bytes, length: int, path: str) -> Header:
    tensors: dict[str, Any] = json.loads(raw)
    metadata = tensors.pop("__metadata__")
    version = int(metadata["format"])
    if version > FORMAT:
        raise Unusable(Reason.NEWER, f"{path} has format {version}, this version of kvsculpt reads {FORMAT}")
    if version != FORMAT:
        raise Unusable(Reason.FOREIGN, f"{path} has format {version}, which there never was")
    parts, end = [], 0
    for tensor in (tensors.pop("keys"), tensors.pop("values"), tensors.pop("pages")):
        dtype = torch.int32 if tensor["dtype"] == "I32" else _DTYPES[tensor["dtype"]]
        shape = tuple(map(int, tensor["shape"]))
        if len(shape) != 2 or min(shape) < 0:
            raise ValueError(f"a tensor of shape {shape}")
        first, end = end, end + shape[0] * shape[1] * dtype.itemsize
        if tensor["data_offsets"] != [first, end]:
            raise ValueError("tensors that do not follow one another")
        parts.append(Part(dtype, shape, first, end))
    if tensors:
        raise ValueError(f"tensors of no use: {sorted(tensors)}")
    about = {str(key): str(value) for key, value in json.loads(metadata["about"]).items()}
    hashed = bytearray(raw)
    hashed[_DIGITS] = _ZEROS
    return Header(bytes(hashed), raw[_DIGITS], str(metadata["name"]), about, parts, 8 + length + end, end)


def _header(segment: StoredSegment) -> bytearray:
    """The header with zeros for its checksum, padded so that the entries are aligned."""
    tensors: dict[str, Any] = {
        "__metadata__": {
            "sha256": _ZEROS.decode(),
            "format": str(FORMAT),
            "name": segment.path,
            "about": json.dumps(segment.about),
        }
    }
    end = 0
    for label, tensor in (("keys", segment.keys), ("values", segment.values), ("pages", segment.pages)):
        first, end = end, end + tensor.nbytes
        dtype = "I32" if tensor.dtype == torch.int32 else _NAMES[tensor.dtype]
        tensors[label] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(tensors, separators=(",", ":")).encode()
    if len(text) + 8 > LONGEST_HEADER:
        raise ValueError(f"`about` is too long: the header may have {LONGEST_HEADER} bytes, and has {len(text)}")
    return bytearray(text + b" " * (-len(text) % 8))


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


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor; of one that is not contiguous or not on the CPU, a copy."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _tensor(whole: memoryview, begin: int, part: Part) -> Tensor:
    first, end = begin + part.first, begin + part.end
    if first == end:
        return torch.empty(part.shape, dtype=part.dtype)
    data: memoryview | bytearray = whole[first:end]
    if whole.readonly:  # torch has no tensors that may not be written to
        data = bytearray(data)
    return torch.frombuffer(data, dtype=part.dtype).view(part.shape)
