"""Why a stored file is not used."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """What is wrong with a file. Metrics have these names."""

    CUT_OFF = "cut_off"  # it ends too early, or is empty
    ALTERED = "altered"  # its content is not what was written
    FOREIGN = "foreign"  # no segment, or not the one that its name says
    NEWER = "newer"  # of a later version's format
    OTHER_SHAPE = "other_shape"  # whole, and its tensors do not fit one another or the cache that reads them
    GONE = "gone"  # it was listed and has been removed since


class Unusable(Exception):
    """A stored segment cannot be used; the message names the file and says why."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
