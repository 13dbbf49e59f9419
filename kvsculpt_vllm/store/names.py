"""What stored segments are called. The file names are the index: one listing tells all that may follow a chain."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from kvsculpt_vllm.sculpt.effort import EFFORTS, order

DIGEST = "[0-9a-f]{64}"
_NUMBER = "[1-9][0-9]{0,8}"
_PATH = re.compile(
    rf"(?P<parent>{DIGEST})/(?P<tokens>{_NUMBER})-(?P<blocks>{_NUMBER})-(?P<effort>{'|'.join(EFFORTS)})"
    rf"-(?P<error>[0-9]\.[0-9]{{6}}e[+-][0-9]{{2,3}})-(?P<made>[0-9a-f]{{8}})-(?P<key>{DIGEST})"
    rf"\.(?P<rank>0|{_NUMBER})-of-(?P<ranks>{_NUMBER})\.safetensors"
)


@dataclass(frozen=True)
class StoredName:
    """Which segment it is, and how good: all that a look-up needs, so that no file has to be opened for it.

    Raises:
        ValueError: a field that no file name can hold.
    """

    parent: bytes  # 32: the key of the segment before it, or the root
    key: bytes  # 32
    tokens: int  # that it stands for
    blocks: int  # that its packed entries take
    effort: str  # one of EFFORTS
    error: float  # held-out; rounded to the seven digits that the file name has, so that names compare equal
    made: str  # 8 hex digits that tell makes of one key apart; all ranks of a make have the same

    def __post_init__(self) -> None:
        if not (math.isfinite(self.error) and self.error >= 0):
            raise ValueError(f"error is {self.error}, allowed: a finite number that is not negative")
        object.__setattr__(self, "error", abs(float(_digits(self.error))))
        if _PATH.fullmatch(self.path(0, 1)) is None:
            raise ValueError(f"no file name can hold {self}")

    def path(self, rank: int, ranks: int) -> str:
        """Where the entries of one rank are, relative to the store."""
        return (
            f"{self.parent.hex()}/{self.tokens}-{self.blocks}-{self.effort}-{_digits(self.error)}-{self.made}"
            f"-{self.key.hex()}.{rank}-of-{ranks}.safetensors"
        )

    @property
    def quality(self) -> tuple[int, float]:
        """Orders makes of one key: more effort is better, then less error."""
        return order(self.effort), -self.error

    @classmethod
    def parse(cls, path: str) -> tuple[StoredName, int, int] | None:
        """Read name, rank and number of ranks from a path as `path` writes it; None for every other one."""
        match = _PATH.fullmatch(path)
        if match is None:
            return None
        error = float(match["error"])
        if not math.isfinite(error):
            return None
        name = cls(
            parent=bytes.fromhex(match["parent"]),
            key=bytes.fromhex(match["key"]),
            tokens=int(match["tokens"]),
            blocks=int(match["blocks"]),
            effort=match["effort"],
            error=error,
            made=match["made"],
        )
        rank, ranks = int(match["rank"]), int(match["ranks"])
        # Not every spelling of a number is the one that `path` writes, and a file has one name.
        if rank >= ranks or name.path(rank, ranks) != path:
            return None
        return name, rank, ranks


def _digits(error: float) -> str:
    return f"{error:.6e}"
