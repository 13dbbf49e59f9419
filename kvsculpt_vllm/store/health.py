"""When a store is left alone. One that is gone is not asked again by every request, and is told of once."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger("vllm.kvsculpt")

FAILURES = 3
"""Failures in a row that begin an outage. A single one may be one file's."""


class Health:
    """Of reading from a store, or of writing to it: a full disk can still be read. Not for several threads at once."""

    def __init__(self, what: str, pause_s: float) -> None:
        """`what` says in the log who cannot be what ("the store /x cannot be read"); after a failure in an outage the
        store is left alone for `pause_s` seconds.
        """
        self._what, self._pause = what, pause_s
        self._failures = 0
        self._until: float | None = None  # monotonic; None when all is well

    @property
    def out(self) -> bool:
        """Whether an outage has begun and nothing has worked since."""
        return self._until is not None

    @property
    def away(self) -> bool:
        """Whether the store is to be left alone now."""
        return self._until is not None and time.monotonic() < self._until

    def worked(self) -> None:
        """An operation was done, in time. One that was begun before an outage and is through now does not end it."""
        self._failures = 0
        if self.out and not self.away:
            self._until = None
            logger.info("%s: it works again.", self._what)

    def failed(self, why: str, at_once: bool = False) -> None:
        """An operation was not done, or, `at_once`, one that shows an outage by itself."""
        self._failures += 1
        if self.out:
            self._until = time.monotonic() + self._pause
        elif at_once or self._failures >= FAILURES:
            self._until = time.monotonic() + self._pause
            logger.warning(
                "%s: %s. It is left alone, and tried again every %g s; requests go on without it. This is said once.",
                self._what,
                why,
                self._pause,
            )
