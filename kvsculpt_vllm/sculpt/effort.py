"""How much work a request's compression may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """Ranking entries is one pass over the queries and gains most from many of them (measured: see
    benchmarks/LOG.md); a fit passes over its queries many times and gets by with fewer."""

    positions: int  # of the prompt whose queries rank entries
    pilot_positions: int  # those of them that the pilot's fits get by with
    fit_positions: int  # those of them whose queries values and keys are fitted to and judged on
    key_steps: int  # L-BFGS steps at most


EFFORTS = {
    "fast": Effort(positions=2048, pilot_positions=128, fit_positions=768, key_steps=0),
    "balanced": Effort(positions=2048, pilot_positions=256, fit_positions=1536, key_steps=5),
    "thorough": Effort(positions=4096, pilot_positions=512, fit_positions=4096, key_steps=50),
}
