"""What a GPU runs, on the CPU through Triton's interpreter: attention backend, page format, both model runners.

Neither CUDA graphs nor streams are seen here.
"""

import pytest

from jobs import on, request

ON = on(min_tokens=128, window=32, max_stall_ms=60_000)
# The prompt becomes a chain of two segments.
CHAIN = on(min_tokens=64, window=32, max_stall_ms=60_000, segment=64, decode=64)

# The second prompt, too short to be compressed, is computed
# beside the first one's decoding from packed pages.
BATCHES = [[request(0, 200, 7), request(5000, 60, 4, after=4)]]


@pytest.fixture
def engine():
    return {
        "max_model_len": 512,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
    }


@pytest.mark.engine
@pytest.mark.parametrize(
    "runner",
    [{"v2": False}, {"v2": True, "asynchronous": True, "self_test": True}],
    ids=["V1", "V2 asynchronous"],
)
def test_every_entry_in_shuffled_packed_pages_gives_the_tokens_of_stock_vllm(run_engine, engine, runner):
    stock = run_engine(engine=engine, batches=BATCHES)
    ours = run_engine(
        engine={**engine, "additional_config": CHAIN},
        batches=BATCHES,
        gpu_path=True,
        identity=True,
        poison=True,
        **runner,
    )
    assert ours["tokens"] == stock["tokens"]
    assert [told["segments"] for told in ours["told"][0]] == [2, 0]
    assert ours["free"][0][-1] == ours["free_at_start"]
    assert ours["published"] == 0
    if "self_test" in runner:  # before it served, with the model's numbers, and what it wrote is not there any more
        assert ours["self_tested"]["failures"] == ours["self_tested"]["left_out"] == []
        assert {"store", "gather", "paged attention", "recorded attention", "loss"} <= {*ours["self_tested"]["kernels"]}
        assert ours["self_tested"]["subject"]["head_size"] == 64
    assert ours["scheduler"] == ("SculptAsyncScheduler" if "asynchronous" in runner else "SculptScheduler")


@pytest.mark.engine
def test_budgets_of_each_head_are_read_as_the_cpu_backend_reads_them(run_engine, engine):
    """Different budgets for every layer and head, from queries that both backends sampled in chunks."""
    job = {"engine": {**engine, "additional_config": ON}, "batches": [[request(2000, 300, 6)]]}
    cpu, gpu = run_engine(**job), run_engine(**job, gpu_path=True, v2=True)
    assert gpu["tokens"] == cpu["tokens"]
    assert gpu["free"] == cpu["free"]
    (theirs,), (ours,) = cpu["compressions"], gpu["compressions"]
    assert ours["error_after"] == pytest.approx(theirs["error_after"], rel=1e-3)
    assert ours["blocks_freed"] > 0
