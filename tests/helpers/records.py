"""A compression that was done."""

from kvsculpt_vllm.engine.shared.record import CompressionRecord

RECORD = CompressionRecord(
    request_id="cmpl-1-0-0123abcd",
    method="sculpt",
    keep_ratio=0.3,
    budget="adaptive",
    effort="fast",
    prompt_tokens=700,
    span_tokens=608,
    entries_kept=192.0,
    blocks_before=22,
    blocks_after=9,
    blocks_freed=13,
    bytes_freed=1300,
    steps_waited=0,
    seconds=1.5,
    error_before=0.2,
    error_after=0.02,
    solver_steps=7,
    heads_at_start=1,
    failed_solves=0,
    budgets=[[128, 256]],
    errors=[[0.01, 0.03]],
)
