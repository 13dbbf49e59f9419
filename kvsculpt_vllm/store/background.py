"""A store in threads of its own, so that a server's step never waits: one that is slow or gone costs hits, no more."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from threading import Condition, Lock, Thread
from typing import Any, TypeVar

from kvsculpt_vllm.store.file import StoredSegment
from kvsculpt_vllm.store.health import Health
from kvsculpt_vllm.store.names import StoredName
from kvsculpt_vllm.store.places import told
from kvsculpt_vllm.store.store import Refusal, Store
from kvsculpt_vllm.store.unusable import Reason, Unusable

logger = logging.getLogger("vllm.kvsculpt")
T = TypeVar("T")

READERS = 4
"""Look-ups and reads at once."""

MOST_STUCK = 8
"""Threads that wait for an operation which nobody waits for any more; with so many nothing new is begun."""


class StoreAway(Exception):
    """The store was not asked, or has not answered in time."""


class Dropped(StrEnum):
    """Why a write came to nothing, besides `Refusal`. Metrics have these names."""

    QUEUE_FULL = "queue_full"  # segments come faster than the store takes them
    AWAY = "away"  # an outage
    FAILED = "failed"  # the file system said no: full, read-only, gone
    UNMADE = "unmade"  # it could not be made into a file: an error of ours, in the log


@dataclass(frozen=True)
class StoreCounts:
    """What has become of all operations of one process since its start."""

    reads: int  # segments
    writes: int
    bytes_read: int  # of their files
    bytes_written: int
    refused: Mapping[str, int]  # writes that came to nothing, by `Refusal` and `Dropped`
    unusable: Mapping[str, int]  # files that were not used, by `Reason`
    failures: int  # operations that the file system has not done
    unanswered: int  # look-ups and reads that ended with StoreAway
    away: bool  # it is not read from now
    writes_away: bool  # it is not written to now


@dataclass(eq=False)
class _Question:
    work: Callable[[Store], Any]
    answer: Future[Any]
    started: float = 0.0  # monotonic
    given_up: bool = False  # it took too long, and its answer was StoreAway


@dataclass(eq=False)
class _Write:
    make: Callable[[], StoredSegment]
    size: int


class BackgroundStore:
    """Look-ups and reads give futures, writes wait in a bounded queue. Its threads start when they are needed, do not
    die by an exception, and do not keep a process from ending.
    """

    def __init__(
        self,
        store: Store,
        *,
        patience_s: float,
        pause_s: float = 30.0,
        most_writes: int = 64,
        most_bytes: int = 1 << 30,
    ) -> None:
        """A look-up or a read that takes longer than `patience_s` begins an outage, and so do failures in a row. In an
        outage the store is left alone for `pause_s` seconds at a time. At most `most_writes` writes, which keep
        `most_bytes` in memory, wait.
        """
        self._store, self._patience = store, patience_s
        self._most_writes, self._most_bytes = most_writes, most_bytes
        self._lock = Lock()
        self._asked, self._begun, self._to_write, self._written = (Condition(self._lock) for _ in range(4))
        self._questions: deque[_Question] = deque()
        self._running: list[_Question] = []
        self._stuck = self._readers = self._idle = 0
        self._writes: deque[_Write] = deque()
        self._writing: _Write | None = None
        self._others: set[str] = set()  # threads besides readers that have started
        self._reading_health = Health(f"The store {store.url} cannot be read", pause_s)
        self._writing_health = Health(f"The store {store.url} cannot be written to", pause_s)
        self._refused: Counter[str] = Counter()
        self._unusable: Counter[str] = Counter()
        self._failures = self._unanswered = 0
        self._closed = False

    def submit(self, work: Callable[[Store], T]) -> Future[T]:
        """Have something looked up or read. The future has what `work` returns or raises. It raises `StoreAway` at once
        in an outage, and as soon as `work` has taken longer than the patience goes.
        """
        question = _Question(work, Future())
        with self._lock:
            away = self._closed or self._reading_health.away or self._stuck >= MOST_STUCK
            if not away:
                self._questions.append(question)
                self._start("watch", self._watch)
                if self._idle < len(self._questions) and self._readers < READERS:
                    self._start_reader()
                self._asked.notify()
        if away:
            self._give_up([question])
        return question.answer

    def write(self, make: Callable[[], StoredSegment], size: int = 0) -> bool:
        """Have a segment written; False if it was dropped at once. `make` runs later, in another thread; `size` is how
        many bytes it keeps in memory until then.
        """
        with self._lock:
            waiting = [*self._writes, *([self._writing] if self._writing else [])]
            if self._closed or self._writing_health.away:
                self._refused[Dropped.AWAY] += 1
                return False
            if len(waiting) >= self._most_writes or sum(write.size for write in waiting) + size > self._most_bytes:
                if not self._refused[Dropped.QUEUE_FULL]:
                    logger.warning(
                        "The store %s takes segments more slowly than they are made: one was not stored. This is said "
                        "once, and counted.",
                        self._store.url,
                    )
                self._refused[Dropped.QUEUE_FULL] += 1
                return False
            self._writes.append(_Write(make, size))
            self._start("write", self._write_all)
            self._to_write.notify()
        return True

    @property
    def writable(self) -> bool:
        """Whether segments are written to it at all."""
        return self._store.writable

    def avoid(self, name: StoredName, ranks: int) -> None:
        """See `Store.avoid`; it takes no look at the store."""
        self._store.avoid(name, ranks)

    def flush(self, timeout: float) -> bool:
        """Wait until nothing waits to be written, for `timeout` seconds at most. Returns whether all that was to be
        written so far is in the store.
        """
        with self._lock:
            done = self._written.wait_for(lambda: not self._writes and self._writing is None, timeout)
            return done and not any(n for reason, n in self._refused.items() if reason != Refusal.THERE)

    def counts(self) -> StoreCounts:
        """What has become of all operations so far; every reason is there."""
        traffic = self._store.traffic()
        with self._lock:
            return StoreCounts(
                reads=traffic.reads,
                writes=traffic.writes,
                bytes_read=traffic.bytes_read,
                bytes_written=traffic.bytes_written,
                refused={reason.value: self._refused[reason] for reason in (*Refusal, *Dropped)},
                unusable={reason.value: self._unusable[reason] for reason in Reason},
                failures=self._failures,
                unanswered=self._unanswered,
                away=self._reading_health.away or self._stuck >= MOST_STUCK,
                writes_away=self._writing_health.away,
            )

    def close(self, timeout: float) -> bool:
        """Write what waits to be written, for `timeout` seconds at most; nothing is looked up any more. Returns whether
        nothing was left.
        """
        with self._lock:
            self._closed = True
            left, self._questions = list(self._questions), deque()
            for condition in (self._asked, self._begun, self._to_write):
                condition.notify_all()
            done = self._written.wait_for(lambda: not self._writes and self._writing is None, timeout)
        self._give_up(left)
        return done

    def _start(self, name: str, run: Callable[[], None]) -> None:
        if name not in self._others:
            self._others.add(name)
            Thread(target=run, name=f"kvsculpt-store-{name}", daemon=True).start()

    def _start_reader(self) -> None:
        self._readers += 1
        Thread(target=self._read_all, name="kvsculpt-store-read", daemon=True).start()

    def _read_all(self) -> None:
        """A reader: one question after the other, until one is given up, in whose place another reader starts."""
        while (question := self._next_question()) is not None:
            value = error = None
            try:
                value = question.work(self._store)
            except BaseException as raised:  # noqa: BLE001 - it belongs to the one who asked, and the thread goes on
                error = raised
            with self._lock:
                if question.given_up:
                    self._stuck -= 1
                    return
                self._running.remove(question)
                self._hear(error, time.monotonic() - question.started)
            if error is None:
                question.answer.set_result(value)
            else:
                question.answer.set_exception(error)
            del question, value, error  # not kept until the next one comes

    def _next_question(self) -> _Question | None:
        with self._lock:
            while True:
                self._idle += 1
                self._asked.wait_for(lambda: self._questions or self._closed)
                self._idle -= 1
                if not self._questions:
                    return None
                question = self._questions.popleft()
                if question.answer.set_running_or_notify_cancel():
                    question.started = time.monotonic()
                    self._running.append(question)
                    self._begun.notify()
                    return question

    def _hear(self, error: BaseException | None, seconds: float) -> None:
        """What a question's end says about the store."""
        if isinstance(error, OSError):
            self._failures += 1
            self._reading_health.failed(told(error))
        elif seconds > self._patience:
            self._reading_health.failed(self._too_slow, at_once=True)
        elif error is None or isinstance(error, Unusable):
            self._reading_health.worked()
        if isinstance(error, Unusable):
            self._unusable[error.reason] += 1
            if self._unusable[error.reason] == 1:
                level = logging.INFO if error.reason == Reason.GONE else logging.WARNING
                logger.log(
                    level, "In the store %s: %s. It is not used; more like it are only counted.", self._store.url, error
                )

    def _watch(self) -> None:
        """Give up what takes too long, and what waits behind it: whoever asked goes on without."""
        while True:
            with self._lock:
                while not self._overdue():
                    if self._closed and not self._running:
                        return
                    first = min((question.started for question in self._running), default=None)
                    self._begun.wait(None if first is None else first + self._patience - time.monotonic())
                given_up = self._overdue()
                for question in given_up:
                    question.given_up = True
                    self._running.remove(question)
                    self._stuck += 1
                    self._readers -= 1
                self._reading_health.failed(self._too_slow, at_once=True)
                given_up += self._questions
                self._questions.clear()
            self._give_up(given_up)
            del given_up

    def _overdue(self) -> list[_Question]:
        now = time.monotonic()
        return [question for question in self._running if now - question.started >= self._patience]

    @property
    def _too_slow(self) -> str:
        return f"it has not answered within {self._patience:g} s"

    def _give_up(self, questions: list[_Question]) -> None:
        """Without the lock: whoever waits may ask again at once."""
        for question in questions:
            if question.answer.running() or question.answer.set_running_or_notify_cancel():
                question.answer.set_exception(StoreAway(f"the store {self._store.url} does not answer"))
        with self._lock:
            self._unanswered += len(questions)

    def _write_all(self) -> None:
        while True:
            with self._lock:
                self._to_write.wait_for(lambda: self._writes or self._closed)
                if not self._writes:
                    return
                self._writing = self._writes.popleft()
                away = self._writing_health.away
            outcome = Dropped.AWAY if away else self._write_one(self._writing.make)
            with self._lock:
                self._writing = None
                if outcome is not None:
                    self._refused[outcome] += 1
                self._written.notify_all()

    def _write_one(self, make: Callable[[], StoredSegment]) -> Refusal | Dropped | None:
        """Why a segment was not written; None if it was."""
        try:
            segment = make()
        except Exception:
            logger.exception("A segment could not be made ready for the store")
            return Dropped.UNMADE
        try:
            refusal = self._store.put(segment)
        except OSError as error:
            with self._lock:
                self._failures += 1
                self._writing_health.failed(told(error))
            return Dropped.FAILED
        except Exception:
            logger.exception("A segment could not be stored")
            return Dropped.UNMADE
        with self._lock:
            self._writing_health.worked()
        return refusal
