"""How much work a request's compression may be."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLE_BYTES = 1 << 29
"""What a prompt's sampled queries may take, the effort's least positions aside. A fit's other tensors take six times as
much at most, in fp32."""


@dataclass(frozen=True)
class Effort:
    """Ranking entries is one pass over the queries and gains most from many of them (measured: see
    benchmarks/LOG.md); a fit passes over its queries many times and gets by with fewer."""

    positions: int  # of the prompt whose queries rank entries, at least
    pilot_positions: int  # those of them that the pilot's fits get by with
    fit_positions: int  # those of them whose queries values and keys are fitted to and judged on
    key_steps: int  # L-BFGS steps at most
    meaning: str = ""

    def positions_for(self, position_bytes: int) -> int:
        """The most positions of a prompt to sample, the queries of all layers taking `position_bytes` at each.

        What would follow a position that is not sampled is not protected (`queries.future_positions`): all of them, as
        far as `SAMPLE_BYTES` goes.
        """
        return max(self.positions, SAMPLE_BYTES // position_bytes)


EFFORTS = {
    "fast": Effort(
        positions=2048, pilot_positions=128, fit_positions=768, key_steps=0, meaning="768 positions, no key steps"
    ),
    "balanced": Effort(
        positions=2048, pilot_positions=256, fit_positions=1536, key_steps=5, meaning="1,536 positions, 5 key steps"
    ),
    "thorough": Effort(
        positions=4096, pilot_positions=512, fit_positions=4096, key_steps=50, meaning="4,096 positions, 50 key steps"
    ),
}
