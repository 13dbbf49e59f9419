"""Segments to store."""

import hashlib
from typing import Any

import torch

from kvsculpt_vllm.store.file import StoredSegment
from kvsculpt_vllm.store.names import StoredName

PARENT = hashlib.sha256(b"root").digest()


def name(label: str = "a", **fields: Any) -> StoredName:
    """A name whose key is made from a label."""
    given = {
        "parent": PARENT,
        "key": hashlib.sha256(label.encode()).digest(),
        "tokens": 2048,
        "blocks": 13,
        "effort": "fast",
        "error": 0.0123,
        "made": "00c0ffee",
    }
    return StoredName(**{**given, **fields})


def segment(
    label: str = "a",
    rank: int = 0,
    ranks: int = 1,
    *,
    dtype: torch.dtype = torch.bfloat16,
    pages: tuple[tuple[int, ...], ...] = ((1, 2), (0, 3)),
    block_size: int = 4,
    width: int = 8,
    **fields: Any,
) -> StoredSegment:
    """Entries that differ from one another, of one rank."""
    counts = torch.tensor(pages, dtype=torch.int32)
    total = int(counts.sum()) * block_size * width
    entries = torch.arange(2 * total, dtype=torch.float32) + 1000 * rank
    keys, values = entries.view(2, -1, width).to(dtype)
    return StoredSegment(
        name(label, **fields), rank, ranks, counts, keys, values, {"model": "tiny", "method": "sculpt"}
    )


def same(one: StoredSegment, other: StoredSegment) -> bool:
    """Whether two are the same to the bit."""
    tensors = [(one.pages, other.pages), (one.keys, other.keys), (one.values, other.values)]
    return (one.name, one.rank, one.ranks, one.about) == (other.name, other.rank, other.ranks, other.about) and all(
        a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in tensors
    )
