"""The self-test of a server's start: on every rank, and a failure on one refuses all."""

from __future__ import annotations

from vllm.logger import init_logger

from kvsculpt_vllm.engine.startup.refusals.device import failed_self_test
from kvsculpt_vllm.engine.worker.agreement import Ranks
from kvsculpt_vllm.engine.worker.selftest.run import Report, self_test, told
from kvsculpt_vllm.engine.worker.selftest.subject import Subject

logger = init_logger("vllm.kvsculpt")


def test_at_start_up(subject: Subject, ranks: Ranks) -> Report:
    """Test this rank's kernels on its own cache, which nobody has written to yet. All ranks come to it together.

    Raises:
        UnsupportedFeature: on every rank, if a kernel of any rank does not compute what it should.
    """
    report = self_test(subject)
    words = report.failure
    if words and ranks.count > 1:
        words = f"rank {ranks.number}: {words}"
    if failures := [words for stage in ranks.gather(words) for words in stage if words]:
        raise failed_self_test(failures)
    if ranks.is_first:
        logger.info(
            "kvsculpt: self-test passed: %d comparisons in %.1f s, kernels compiled on the way; %s%s",
            len(report.measured),
            report.seconds,
            told(report.machine),
            "".join(f"; left out: {why}" for why in report.left_out),
        )
    return report
