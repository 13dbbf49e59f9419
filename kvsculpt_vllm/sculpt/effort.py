"""How much work a request's compression may be."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLE_BYTES = 784 << 20
"""Bytes that the sampled queries of a segment may take: those of 3,136 positions (the longest segment of 2,048 tokens
and its window of 64) of a model with 256 KiB a position (8B, in bfloat16). An effort's least number of positions is
sampled even if its queries take more."""


FULL_UP_TO = 2048
"""Entries of a segment up to which fits use all of an effort's positions."""

FEWEST = 768
"""Positions that fits of longer segments use at least, or the effort's own if it has fewer."""


@dataclass(frozen=True)
class Effort:
    """How many queries and how many steps a compression may use.

    Ranking the entries is one pass over the queries, and gains most from many of them (measured: see
    benchmarks/LOG.md). A fit passes over its queries many times, and gets by with fewer.
    """

    positions: int  # of the prompt whose queries rank entries, at least
    pilot_positions: int  # those of them that the pilot's fits get by with
    fit_positions: int  # those of them whose queries values and keys are fitted to and judged on (see `fitted_on`)
    key_steps: int  # L-BFGS steps at most
    # Whether values are fitted to keys as they were selected, too, besides those with the span's mass (`mass`), and
    # held-out queries choose.
    plain_start: bool = True
    meaning: str = ""

    def fitted_on(self, num_entries: int) -> int:
        """Say how many positions a segment of `num_entries` is fitted to.

        A fit takes time by the square of the entries. So that a token of a longer segment takes no more of it, its fit
        has fewer positions, in proportion: their entries are more alike, and it loses less all the same (measured:
        benchmarks/LOG.md).
        """
        shorter = self.fit_positions * FULL_UP_TO // max(num_entries, FULL_UP_TO)
        return max(shorter, min(self.fit_positions, FEWEST))

    def positions_for(self, position_bytes: int) -> int:
        """Say how many positions of a segment to sample at most, if the queries of all layers take `position_bytes` at
        each.

        All of them, as far as `SAMPLE_BYTES` goes, and never fewer than `positions`: the fit does not keep what follows
        a position that is not sampled (`queries.future_positions`). So up to 256 KiB a position, which is an 8B model
        on one GPU, a segment of the default length is sampled as a whole. Beyond that a longest segment is sampled at
        `positions` of its 3,136 positions, and loses what follows the others; tensor parallelism divides the bytes.
        """
        return max(self.positions, SAMPLE_BYTES // position_bytes)


EFFORTS = {
    "fast": Effort(
        positions=2048,
        pilot_positions=128,
        fit_positions=768,
        key_steps=0,
        plain_start=False,
        meaning="768 positions, one start, no key steps",
    ),
    "balanced": Effort(
        positions=2048, pilot_positions=256, fit_positions=1536, key_steps=5, meaning="1,536 positions, 5 key steps"
    ),
    "thorough": Effort(
        positions=4096, pilot_positions=512, fit_positions=4096, key_steps=50, meaning="4,096 positions, 50 key steps"
    ),
}


def order(effort: str) -> int:
    """Which of `EFFORTS` it is: more is more."""
    return list(EFFORTS).index(effort)
