"""Segments that come out of the store: stock vLLM's tokens, after a restart, with several ranks, with broken files."""

import pytest

from jobs import on, request
from kvsculpt_vllm.store.names import StoredName

pytestmark = pytest.mark.engine

LENGTH, SEGMENT = 900, 256


def stored_in(directory, **settings):
    """Settings of an engine that makes chains and keeps them there."""
    return on(max_stall_ms=60_000, segment=SEGMENT, decode=SEGMENT, min_tokens=128, store=str(directory), **settings)


def test_segments_from_the_store_give_the_tokens_of_stock_vllm(run_engine, tmp_path):
    """A document, then questions about it after the cache was emptied, and from another process with a broken file."""
    batches = [[request(0, LENGTH)], [request(0, LENGTH + 40), request(3000, 300)]]
    engine = {"enable_prefix_caching": True, "max_num_batched_tokens": 512}
    stock = run_engine(engine=engine, batches=batches)
    engine |= {"additional_config": stored_in(tmp_path)}
    ours = run_engine(engine=engine, batches=batches, identity=True, empty_before=[1])
    assert ours["tokens"] == stock["tokens"] and ours["in_store"]
    (made,), (read, other) = ours["told"]
    assert (made["segments"], made["tokens_sculpted"], made["tokens_read"]) == (3, 832, 0)
    assert (read["segments"], read["tokens_sculpted"], read["tokens_read"]) == (3, 0, 832)
    assert ours["cached"][1][0] == 832
    assert other["tokens_read"] == 0
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3 + other["segments"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    found = ours["stats"]["found"]
    assert (found["store_hits"], found["read"], found["unreadable"]) == (1, 3, 0) and found["store_misses"] == 2

    # The last one of the document's chain is cut off: a crash of the disk's machine, say.
    names = {StoredName.parse(str(file.relative_to(tmp_path)))[0]: file for file in files}
    parents = {name.key: name.parent for name in names}
    (third,) = (name for name in names if parents.get(parents.get(name.parent)) is not None)
    names[third].write_bytes(names[third].read_bytes()[:-1])
    ours = run_engine(engine=engine, batches=batches, identity=True, again=True)
    assert ours["tokens"] == stock["tokens"]
    (first,), (second, _) = ours["told"]
    assert first["tokens_read"] == 2 * SEGMENT and first["tokens_sculpted"] == 832 - 2 * SEGMENT
    assert second["tokens_found"] == 832 and second["tokens_read"] == 0
    assert ours["stats"]["found"]["unreadable"] == 1
    assert ours["in_store"]  # it was written anew
    assert ours["free"][-1][-1] == ours["free_at_start"]


def test_every_rank_keeps_its_part(run_engine, tmp_path):
    batches = [[request(0, LENGTH)], [request(0, LENGTH + 40)]]
    engine = {"tensor_parallel_size": 3, "enable_prefix_caching": True}
    stock = run_engine(engine={"enable_prefix_caching": False}, batches=batches)
    engine |= {"additional_config": stored_in(tmp_path)}
    ours = run_engine(engine=engine, batches=batches, identity=True, empty_before=[1])
    assert ours["tokens"] == stock["tokens"]
    assert ours["told"][1][0]["tokens_read"] == 832
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3 * 3
