"""The methods of this package, by the very call that the engine makes."""

from __future__ import annotations

from collections.abc import Callable

from kvsculpt_vllm.sculpt.compress import Compressed, Effort, PagePlan, compress
from kvsculpt_vllm.sculpt.problem import Problems


def sculpted(name: str) -> Callable[[Problems, PagePlan, str, Effort], Compressed]:
    """Method `name` of `sculpt.compress` (select, select_fit or sculpt)."""

    def run(problems: Problems, plan: PagePlan, budget: str, effort: Effort) -> Compressed:
        return compress(problems, plan, name, budget, effort.key_steps, effort.fit_positions, effort.pilot_positions)

    return run
