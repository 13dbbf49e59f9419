"""All checks in a row, and what came of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import vllm

from kvsculpt_vllm.engine.worker.selftest import attention_check, page_check, solver_check
from kvsculpt_vllm.engine.worker.selftest.notes import Measured, Notes
from kvsculpt_vllm.engine.worker.selftest.subject import END_BLOCKS, Subject
from kvsculpt_vllm.kernels.dispatch import VARIABLE, use_triton

CHECKS: dict[str, Callable[[Subject, Notes], None]] = {
    "page copies": page_check.check,
    "attention": attention_check.against_twin,
    "attention of vLLM": attention_check.against_vllm,
    "recorded attention": attention_check.as_recorded,
    "scores": solver_check.scores,
    "losses": solver_check.losses,
    "values": solver_check.values,
    "linear systems": solver_check.systems,
    "compression": solver_check.compression,
}


@dataclass(frozen=True)
class Report:
    """What a self-test found."""

    machine: dict[str, str]  # device, versions, and how kernels run
    subject: dict[str, int | str]
    measured: list[Measured]
    left_out: list[str]
    seconds: float

    @property
    def failures(self) -> list[Measured]:
        """What is further off than it may be."""
        return [each for each in self.measured if not each.good]

    @property
    def failure(self) -> str:
        """What failed first, on what, for people; empty if nothing did."""
        if not self.failures:
            return ""
        first, *others = self.failures
        more = f", and {len(others)} more" if others else ""
        return f"{first.kernel}: {first.told()}{more}; {told(self.subject)}; {told(self.machine)}"

    def worst(self) -> dict[str, Measured]:
        """Of each kernel the comparison that is the furthest off."""
        worst: dict[str, Measured] = {}
        for each in self.measured:
            known = worst.get(each.kernel)
            if (
                known is None
                or (known.good and not each.good)
                or (known.good == each.good and known.error < each.error)
            ):
                worst[each.kernel] = each
        return worst

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "passed": not self.failures,
            "seconds": round(self.seconds, 2),
            "machine": self.machine,
            "subject": self.subject,
            "left_out": self.left_out,
            # JSON has no infinity
            "measured": [
                {**each._asdict(), "error": min(each.error, 1e30), "passed": each.good} for each in self.measured
            ],
        }


@torch.inference_mode()
def self_test(subject: Subject) -> Report:
    """Make all checks. The blocks at both ends of the cache are written if they are empty, and emptied afterwards."""
    # Triton's interpreter runs one program after the other: nothing can race there.
    notes, begin = Notes(again=not triton.knobs.runtime.interpret), time.perf_counter()
    with _kernels_chosen():
        _made("KV cache", _prepare, subject, notes)
        if not notes.measured:
            for name, check in CHECKS.items():
                _made(name, check, subject, notes)
            _made("emptying the cache", _tidy, subject, notes)
    seconds = time.perf_counter() - begin
    return Report(machine(subject.device), subject.described(), notes.measured, notes.left_out, seconds)


def machine(device: torch.device) -> dict[str, str]:
    """What a self-test runs on."""
    interpreted = triton.knobs.runtime.interpret
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "kernels": "interpreted" if interpreted else "compiled",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": vllm.__version__,
    }


def told(facts: dict[str, Any]) -> str:
    """Facts in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())


def _prepare(subject: Subject, notes: Notes) -> None:
    """Write down why nothing can be tested, if so."""
    if subject.num_blocks < 2 * END_BLOCKS:
        notes.write("KV cache", f"{subject.num_blocks} blocks, {2 * END_BLOCKS} are needed to test", 1.0)
    elif subject.holds_something():
        notes.write("KV cache", f"blocks {subject.blocks} are to be written and hold something", 1.0)
    elif subject.device.type == "cuda" and not use_triton(subject.views[0]):
        notes.leave_out(f"the solver's kernels and copies of whole pages: {VARIABLE} is {os.environ[VARIABLE]}")


def _tidy(subject: Subject, notes: Notes) -> None:
    """Leave nothing behind, in the cache or beside it."""
    subject.clear()
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graphs to come get their memory from what is free


def _made(name: str, check: Callable[[Subject, Notes], None], subject: Subject, notes: Notes) -> None:
    """Make a check. What it raises is written down: other ranks wait to hear of it."""
    try:
        check(subject, notes)
        if subject.device.type == "cuda":
            torch.cuda.synchronize()  # a fault of the device shows here at the latest
    except Exception as error:  # noqa: BLE001 - a kernel that does not compile, or anything else
        notes.write(name, f"{type(error).__name__}: {error}", float("inf"))


@contextmanager
def _kernels_chosen() -> Iterator[None]:
    """In Triton's interpreter the solver calls its kernels, and not the twins that run on a CPU."""
    before = os.environ.get(VARIABLE)
    if triton.knobs.runtime.interpret:
        os.environ[VARIABLE] = "triton"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
