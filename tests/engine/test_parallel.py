"""Several ranks, each with some layers and heads of one model, over gloo on the CPU."""

import pytest

from jobs import on, request

pytestmark = pytest.mark.engine

ON = on(
    "select_fit", 0.5, budget="uniform", effort="fast", max_stall_ms=60_000, segment=256, decode=256, min_tokens=128
)
LENGTH, MAX_TOKENS = 600, 16


# On a CPU only the V2 model runner has pipelines.
@pytest.mark.parametrize(
    ("split", "num_ranks", "v2"), [("tensor_parallel_size", 3, False), ("pipeline_parallel_size", 2, True)]
)
def test_ranks_compress_as_one_and_fail_as_one(run_engine, split, num_ranks, v2):
    """Three heads on three ranks, or two layers in two stages: together they find what one process finds."""
    engine = {"enable_prefix_caching": False}
    several = {**engine, split: num_ranks, "additional_config": ON}
    batch = [
        request(0, LENGTH, MAX_TOKENS),
        request(2000, LENGTH, MAX_TOKENS, fault="solve"),
        request(3000, LENGTH, MAX_TOKENS, fault="once", kv_compression_on_failure="select"),
        # One segment: of several the first ones would be copies.
        request(4000, LENGTH // 2, MAX_TOKENS, kv_compression_max_error=1e-9),
    ]
    plain = [request(r["start"], r["length"], MAX_TOKENS) for r in batch]
    stock = run_engine(engine=engine, batches=[plain])
    one = run_engine(engine={**engine, "additional_config": ON}, batches=[plain[:1]])
    # The first one alone, as in one process: how many of its tokens are of the exact cache depends on who else runs.
    ranks = run_engine(engine=several, batches=[batch[:1], batch[1:]], fault_rank=num_ranks - 1, v2=v2)

    (alone,) = one["compressions"]
    assert alone["segments"] == 2
    whole, selected = ranks["compressions"]
    assert ranks["tokens"][0][0] == one["tokens"][0][0]
    assert whole["request_id"].startswith("0-0") and selected["request_id"].startswith("1-1")
    for name in ("error_before", "error_after", "entries_kept"):
        assert whole[name] == pytest.approx(alone[name], rel=1e-3)
    assert whole["bytes_freed"] == alone["bytes_freed"]
    assert ranks["stats"]["bytes_freed"] == whole["bytes_freed"] + selected["bytes_freed"]

    assert [ranks["tokens"][1][i] for i in (0, 2)] == [stock["tokens"][0][i] for i in (1, 3)]
    assert selected["method"] == "select"
    assert ranks["stats"]["requests"]["failed"] == {"exception": 1}
    assert ranks["stats"]["requests"]["fallback"] == {"exception": 1, "error_bound": 1}
    assert ranks["published"] == 0
    assert ranks["free"][-1][-1] == ranks["free_at_start"]
