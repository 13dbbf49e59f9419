"""A refusal, the error that carries several, and the rule that brings one about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OTHER_MODEL = "choose a model of plain full attention"
"""A cure."""


class Refusal(NamedTuple):
    """A feature that was found, why compression cannot work with it, and what to do."""

    feature: str
    cause: str
    cure: str

    def __str__(self) -> str:
        return f"{self.feature}: {self.cause}; {self.cure}"


class UnsupportedFeature(ValueError):
    """The server cannot compress as it is configured. `refusals` holds every reason."""

    def __init__(self, refusals: list[Refusal]) -> None:
        reasons = "".join(f"\n- {refusal}" for refusal in refusals)
        super().__init__(f"--kv-compression cannot be used here (--kv-compression none turns it off):{reasons}")
        self.refusals = tuple(refusals)

    def __reduce__(self) -> tuple:
        # The default would rebuild it from the message; vLLM passes errors between processes.
        return type(self), (list(self.refusals),)


class Rule(NamedTuple):
    """A refusal that the configuration shows."""

    found: Callable[[VllmConfig], Any]
    refusal: Refusal


def refuse(refusals: Iterable[Refusal]) -> None:
    """Refuse if there is anything to refuse.

    Raises:
        UnsupportedFeature: with all of them.
    """
    if refusals := list(refusals):
        raise UnsupportedFeature(refusals)
