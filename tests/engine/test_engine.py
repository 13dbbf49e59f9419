"""The engine on the real model, compared with stock vLLM's greedy tokens."""

import pytest

from jobs import check_chains, on, request
from kvsculpt_vllm.models import fast_dtype

pytestmark = pytest.mark.engine

# Bounds that no compression reaches, random weights' neither: each is done before one step, as the keep ratio says.
# What the bounds do has tests of its own.
AT_ONCE = {"max_stall_ms": 60_000, "max_error": 100.0}
ON = on(**AT_ONCE)
# Prompts become chains.
CHAINS = on(**AT_ONCE, segment=256, decode=128, min_tokens=128)

# A long and a short prompt together, then the long one again beside another long one.
MIXED = [[request(0, 1200), request(5000, 300)], [request(0, 1200), request(2000, 900)]]

IDENTITY_CASES = {
    "chunked prefill, prefix cache on": {
        "engine": {"max_num_batched_tokens": 256, "enable_prefix_caching": True},
        "batches": MIXED,
    },
    "all layers, one chunk, no cache, old blocks poisoned": {
        "engine": {"enable_prefix_caching": False},
        "batches": [[request(0, 800, 12), request(5000, 300, 12)]],
        "poison": True,
    },
    # The late, important request leaves no block to grow into: a compressed one has to go, and comes back.
    "forced preemption": {
        "engine": {
            "enable_prefix_caching": False,
            "num_gpu_blocks_override": 64,
            "max_model_len": 1024,
            "scheduling_policy": "priority",
        },
        "batches": [
            [
                request(0, 620, 80, priority=9),
                request(2000, 600, 80, priority=9),
                request(4000, 700, 50, after=6),
            ]
        ],
        "poison": True,
    },
}


def trained(path):
    """An engine whose weights are not random: how much a compression loses is that of language."""
    return {"model": str(path), "dtype": "float32"}


def test_the_v2_model_runner_gives_the_same_tokens(run_engine):
    batches, engine = [[request(0, 600, 5), request(5000, 64, 5)]], {"enable_prefix_caching": False}
    stock = run_engine(engine=engine, batches=batches)
    ours = run_engine(
        engine={**engine, "additional_config": CHAINS}, batches=batches, v2=True, identity=True, poison=True
    )
    assert [told and told["segments"] for told in ours["told"][0]] == [2, 0]
    assert ours["tokens"] == stock["tokens"]
    assert ours["stats"]["requests"]["compressed"] == {"": 1}
    assert ours["free"][0][-1] == ours["free_at_start"]


@pytest.mark.parametrize("case", IDENTITY_CASES)
def test_every_entry_in_shuffled_packed_pages_gives_the_tokens_of_stock_vllm(run_engine, model_path, case):
    """Whatever pages the packed prefix lies in, attention must find exactly the same entries."""
    job = {"poison": False, **IDENTITY_CASES[case]}
    if case.startswith("all layers"):
        job["engine"] = {**job["engine"], "model": str(model_path), "dtype": fast_dtype()}
    stock = run_engine(engine=job["engine"], batches=job["batches"])
    ours = run_engine(
        engine={**job["engine"], "additional_config": ON},
        batches=job["batches"],
        identity=True,
        poison=job["poison"],
    )
    assert ours["tokens"] == stock["tokens"]
    compressed = ours["stats"]["requests"]["compressed"][""]
    assert ours["free"][-1][-1] == ours["free_at_start"]
    assert ours["published"] == ours["stats"]["pool"]["segments"]
    if case == "forced preemption":
        assert stock["preemptions"] > 0 and ours["preemptions"] > 0
        assert compressed > len(ours["compressions"]) >= 2  # one was compressed, preempted and compressed again
    else:
        found = ours["stats"]["requests"]["found"].get("cached", 0)
        assert compressed + found == sum(r["length"] >= 512 for batch in job["batches"] for r in batch)
    if job["engine"]["enable_prefix_caching"]:
        # The same prompt again finds what the first was given, and the blocks behind it.
        assert ours["cached"][1][0] == stock["cached"][1][0]
        assert ours["stats"]["requests"]["found"] == {"cached": 1}


def test_a_segment_that_is_found_or_adopted_gives_the_tokens_of_stock_vllm(run_engine):
    """Questions about one document, turns of a conversation, several requests at once; exact ones beside them."""
    batches = [
        [request(0, 1200)],
        [request(0, 1250), request(0, 1240, kv_compression="none")],  # another question, and one that wants it exact
        [request(0, 1400)],  # a later turn: the text goes on
        [request(3000, 880, 40), request(3000, 900, 30), request(3000, 900, 30)],  # at once: one is sculpted for all
        [request(0, 1210, kv_compression_keep_ratio=0.5)],  # other settings, another segment
    ]
    engine = {"enable_prefix_caching": True, "max_num_batched_tokens": 512}
    stock = run_engine(engine=engine, batches=[[{**r, "extra_args": None} for r in batch] for batch in batches])
    ours = run_engine(engine={**engine, "additional_config": ON}, batches=batches, identity=True)
    # The last one computes in other chunks than stock vLLM, which may round otherwise.
    assert ours["tokens"][:4] == stock["tokens"][:4]
    span = (1200 - 64) // 32 * 32
    assert ours["cached"][1][0] >= span and ours["cached"][2][0] >= span
    stories = {story["request_id"][:3]: (story["outcome"], story["reason"]) for story in ours["stories"]}
    assert stories["0-0"] == ("compressed", "")
    assert stories["1-0"] == stories["2-0"] == ("found", "cached")
    assert stories["1-1"] == ("skipped", "off")
    assert sorted(stories[f"3-{i}"] for i in range(3)) == [("compressed", ""), *[("found", "adopted")] * 2]
    assert stories["4-0"] == ("compressed", "")
    # Each answer says so itself.
    assert [[(told["outcome"], told["reason"]) for told in batch] for batch in ours["told"]] == [
        [stories[f"{b}-{r}"] for r in range(len(batch))] for b, batch in enumerate(batches)
    ]
    assert (ours["told"][0][0]["tokens_sculpted"], ours["told"][1][0]["tokens_found"]) == (span, span)
    assert ours["told"][0][0]["entries_held"] == ours["told"][1][0]["entries_held"] == span  # the identity keeps all
    assert ours["free"][-1][-1] == ours["free_at_start"]


def test_chains_that_are_made_while_prompts_are_computed_give_the_tokens_of_stock_vllm(run_engine):
    """Several prompts in chunks smaller than a segment, in one batch; what their blocks held before is spoilt."""
    batches = [[request(0, 1200), request(5000, 300), request(2000, 900)], [request(0, 1300)]]
    engine = {"max_num_batched_tokens": 200, "enable_prefix_caching": False}
    stock = run_engine(engine=engine, batches=batches)
    ours = run_engine(engine={**engine, "additional_config": CHAINS}, batches=batches, identity=True, poison=True)
    assert ours["tokens"] == stock["tokens"]
    assert [[told["segments"] for told in batch] for batch in ours["told"]] == [[4, 1, 3], [5]]
    assert ours["stats"]["requests"]["compressed"] == {"": 4} and ours["stats"]["segments"] == 13
    assert ours["free"][-1][-1] == ours["free_at_start"] and ours["published"] == 0


def test_chains_that_are_found_adopted_or_grow_give_the_tokens_of_stock_vllm(run_engine):
    """Questions about one document, turns of a conversation, twins, and answers that become segments themselves."""
    batches = [
        [request(0, 1200)],
        [request(0, 1250)],  # another question
        [request(0, 1280)],  # a later turn
        [request(0, 660)],  # the beginning of the document: the first two segments are found
        [request(3000, 880, 40), request(3000, 900, 30), request(3000, 900, 30)],  # at once
        [request(7000, 100, 350)],  # a long answer to a short prompt
        [request(7000, 250, 150)],
    ]
    engine = {"enable_prefix_caching": True, "max_num_batched_tokens": 512}
    stock = run_engine(engine=engine, batches=batches)
    ours = run_engine(engine={**engine, "additional_config": CHAINS}, batches=batches, identity=True)
    assert ours["tokens"] == stock["tokens"]
    # A prompt that is to be sculpted computes all of it.
    assert ours["cached"] == [*stock["cached"][:6], [0]]
    check_chains(ours)


def test_a_prompt_longer_than_the_memory_is_served_and_gives_the_tokens_of_stock_vllm(run_engine):
    """Memory for 1,152 tokens, prompts of 1,900 and 1,500 that are to share it, and an answer that goes on."""
    batches = [[request(0, 1900, 60), request(3000, 1500, 20)], [request(0, 300, 350)]]
    settings = on(keep_ratio=0.3, **AT_ONCE, segment=256, decode=128, min_tokens=128)
    engine = {"enable_prefix_caching": True, "max_num_batched_tokens": 256}
    with_memory = run_engine(engine={**engine, "additional_config": settings}, batches=batches)
    little = {**engine, "additional_config": settings, "num_gpu_blocks_override": 37}
    ours = run_engine(engine=little, batches=batches)
    assert [len(tokens) for tokens in ours["tokens"][0]] == [60, 20]
    assert [told["segments"] for told in ours["told"][0]] == [told["segments"] for told in with_memory["told"][0]]
    assert ours["free"][-1][-1] == ours["free_at_start"] == 36
    assert len(ours["tokens"][1][0]) == 350
    # Stock vLLM does not even start.
    with pytest.raises(pytest.fail.Exception, match="larger than the available KV cache memory"):
        run_engine(engine={**engine, "num_gpu_blocks_override": 37}, batches=batches)


def test_between_the_slices_of_a_compression_everybody_decodes(run_engine):
    """One slice a step: the request goes on with its exact cache until the last one, and loses none of it before."""
    batches, engine = [[request(0, 600, 70), request(5000, 300, 70)]], {"enable_prefix_caching": False}
    stock = run_engine(engine=engine, batches=batches)
    sliced = on(max_stall_ms=0)
    ours = run_engine(engine={**engine, "additional_config": sliced}, batches=batches, identity=True, poison=True)
    assert ours["tokens"] == stock["tokens"]
    assert ours["stats"]["requests"]["compressed"] == {"": 1}
    free, span_blocks = ours["free"][0], 16
    solving = [step for step, blocks in enumerate(free) if blocks <= free[0] - span_blocks]
    # A slice for each of the model's layers, at the least.
    assert solving == list(range(solving[0], solving[-1] + 1)) and 2 < len(solving) < 60
    assert free[-1] == ours["free_at_start"]


def test_requests_that_stay_exact_give_the_tokens_of_stock_vllm(run_engine):
    """Off for the request, too short, nothing to free: untouched, also beside a compressed request."""
    exact = [
        request(0, 800, kv_compression="none"),
        request(3000, 400),
        request(6000, 700, kv_compression_keep_ratio=1.0),
    ]
    compressed = request(1000, 1100)
    plain = [{**r, "extra_args": None} for r in (*exact, compressed)]
    engine = {"enable_prefix_caching": False}
    stock = run_engine(engine=engine, batches=[plain])
    ours = run_engine(engine={**engine, "additional_config": ON}, batches=[[*exact, compressed]])
    assert ours["tokens"][0][:3] == stock["tokens"][0][:3]
    assert ours["stats"]["requests"]["compressed"] == {"": 1}


@pytest.mark.parametrize("method", ["select", "select_fit", "sculpt"])
def test_freed_blocks_are_free_while_the_request_decodes(run_engine, first_layers_path, method):
    settings = {"kv_compression": method, "kv_compression_keep_ratio": 0.25, "kv_compression_effort": "fast"}
    lone = request(0, 1100, 20, **settings)
    result = run_engine(
        engine={"additional_config": ON, "enable_prefix_caching": False} | trained(first_layers_path),
        batches=[
            [{**lone, "extra_args": {**settings, "kv_compression": m}}] for m in ("select", "select_fit", "sculpt")
        ],
    )
    index = ("select", "select_fit", "sculpt").index(method)
    prompt_blocks, span_blocks, packed = 35, 32, 8  # 1100 tokens, of which 64 and the broken block stay exact
    free, start = result["free"][index], result["free_at_start"]
    record = result["compressions"][index]
    assert start - free[0] == prompt_blocks
    assert record["blocks_freed"] == span_blocks - packed
    assert start - free[3] == prompt_blocks - span_blocks + packed
    assert free[-1] == start
    assert record["method"] == method
    assert record["entries_kept"] == pytest.approx(packed * 32)
    assert 0 <= record["error_after"] <= record["error_before"]
    if method != "select":
        assert record["error_after"] < record["error_before"]


def test_requests_that_share_a_prompt_are_sculpted_once_and_hold_no_more_than_exact_ones(run_engine):
    gently = on(keep_ratio=0.7, **AT_ONCE)
    batches = [[request(0, 1800, 20), request(0, 1800, 12), request(0, 1800, 12, kv_compression="none")]]
    plain = [[{**r, "extra_args": None} for r in batches[0]]]
    stock = run_engine(engine={"enable_prefix_caching": True}, batches=plain)
    result = run_engine(engine={"additional_config": gently, "enable_prefix_caching": True}, batches=batches)
    # Those that come second use all that was found.
    assert result["cached"] == stock["cached"]
    assert result["tokens"][0][2] == stock["tokens"][0][2]
    # While the exact one holds the blocks nothing would come free; then one is sculpted, for whoever is left.
    assert result["stats"]["deferred"] == {"shared_blocks": 2}
    (record,) = result["compressions"]
    assert record["request_id"].startswith("0-0")
    assert record["blocks_freed"] == 54 - 38
    assert min(result["free"][0][:12]) >= min(stock["free"][0][:12])
    assert result["free"][0][-1] == result["free_at_start"]


def test_seeded_answers_survive_chunks_and_shortened_hits(run_engine):
    """vLLM's CPU runner cannot rewind the generator of a seeded request that is computed in chunks; here it can.

    Against one chunk: what was drawn after the chunks before the last must not have moved the generator on.
    """
    seeded = {"temperature": 1.0, "seed": 7}
    engine = {"enable_prefix_caching": True}
    exact = [request(0, 900, 8, sampling={**seeded, "n": n}, kv_compression="none") for n in (1, 3)]
    plain = [[{**r, "extra_args": None}] for r in exact]
    stock = run_engine(engine={**engine, "max_num_batched_tokens": 2048}, batches=plain)
    sampled = [request(2000, 1300, 8, sampling={**seeded, "n": n}) for n in (1, 2, 1)]
    ours = run_engine(
        engine={**engine, "max_num_batched_tokens": 256, "additional_config": ON},
        batches=[*([r] for r in exact), *([r] for r in sampled)],
    )
    assert ours["samples"][:2] == stock["samples"]
    # Compressed ones get as far, whether their prompt is new, shared among answers, or found in the prefix cache.
    assert [len(answers) for (answers,) in ours["samples"][2:]] == [1, 2, 1]
    assert ours["stats"]["requests"]["compressed"] == {"": 1}
    assert ours["stats"]["requests"]["found"] == {"cached": 3}


FAULTS = {
    "capture": "queries_missing",
    "gather": "exception",
    "queries not finite": "not_finite",
    "solve": "exception",
    "out of memory": "out_of_memory",
    "values not finite": "not_finite",
    "scatter": "exception",
    "directory": "exception",
}


def test_a_compression_that_fails_anywhere_leaves_the_exact_cache(run_engine):
    """One request a fault, wherever and whatever it is: its tokens are stock vLLM's; one beside it is compressed."""
    # One is compressed a step: all have to be there until the last one's turn.
    steps = len(FAULTS) + 8
    uniform = {"kv_compression": "select", "kv_compression_budget": "uniform", "kv_compression_effort": "fast"}
    requests = [request(i * 700, 520, steps, fault=fault, **uniform) for i, fault in enumerate(FAULTS)]
    requests.append(request(100, 520, steps, **uniform))
    # With --kv-compression-on-failure select, selection takes the place of what failed; exact if it fails too.
    select = {**uniform, "kv_compression": "select_fit", "kv_compression_on_failure": "select"}
    requests += [request(200 + i, 520, steps, fault=fault, **select) for i, fault in enumerate(("once", "always"))]
    engine = {"enable_prefix_caching": False}
    stock = run_engine(engine=engine, batches=[[request(r["start"], 520, steps) for r in requests]])
    ours = run_engine(engine={**engine, "additional_config": ON}, batches=[requests])
    stories = {int(story["request_id"].split("-")[1]): story for story in ours["stories"]}
    for r, reason in enumerate(FAULTS.values()):
        assert ours["tokens"][0][r] == stock["tokens"][0][r]
        assert (stories[r]["outcome"], stories[r]["reason"]) == ("failed", reason)
    healthy, once, always = (stories[len(FAULTS) + i] for i in range(3))
    assert healthy["outcome"] == "compressed"
    assert (once["outcome"], once["reason"]) == ("fallback", "exception")
    assert (once["compression"]["method"], once["compression"]["budget"]) == ("select", "uniform")
    assert (always["outcome"], always["reason"]) == ("failed", "exception")
    assert ours["tokens"][0][-1] == stock["tokens"][0][-1]
    assert ours["free"][0][-1] == ours["free_at_start"]
    assert ours["published"] == 0


def test_a_compression_that_loses_too_much_is_not_used(run_engine):
    engine = {"enable_prefix_caching": False}
    strict, plain = request(0, 600, 6, kv_compression_max_error=1e-9), request(2000, 600, 6)
    stock = run_engine(engine=engine, batches=[[request(0, 600, 6), request(2000, 600, 6)]])
    ours = run_engine(engine={**engine, "additional_config": ON}, batches=[[strict, plain]])
    assert ours["tokens"][0][0] == stock["tokens"][0][0]
    assert ours["stats"]["requests"]["fallback"] == {"error_bound": 1}
    assert [record["request_id"][:3] for record in ours["compressions"]] == ["0-1"]
    assert ours["free"][0][-1] == ours["free_at_start"]


def test_a_prompt_whose_queries_find_no_room_stays_exact(run_engine):
    """Two prompts in one step, and memory for the queries of one."""
    engine, batches = {"enable_prefix_caching": False}, [[request(0, 600, 6), request(2000, 600, 6)]]
    stock = run_engine(engine=engine, batches=batches)
    ours = run_engine(engine={**engine, "additional_config": ON}, batches=batches, samples_bytes=1 << 20)
    assert ours["tokens"][0][1] == stock["tokens"][0][1]
    assert ours["stats"]["requests"]["compressed"] == {"": 1}
    assert ours["stats"]["requests"]["fallback"] == {"no_room_for_queries": 1}
    assert ours["stats"]["requests"]["failed"] == {}


def test_a_request_aborted_between_slices_returns_the_blocks_taken_for_it(run_engine):
    sliced = on(max_stall_ms=0)
    result = run_engine(
        engine={"additional_config": sliced, "enable_prefix_caching": False},
        # Beside another one: alone it would be through in a step.
        batches=[[request(0, 1000, 200), request(5000, 64, 200)], [request(2000, 700, 8)]],
        abort_after=12,
    )
    # Its own and the other one's, and those that were being filled.
    assert result["free_at_start"] - result["free"][0][10] == 32 + 3 + 9
    assert [free[-1] for free in result["free"]] == [result["free_at_start"]] * 2
    assert result["stats"]["requests"]["skipped"]["ended_first"] == 1
    assert result["published"] == 0


def test_an_aborted_request_returns_its_packed_blocks(run_engine):
    result = run_engine(
        engine={"additional_config": ON, "enable_prefix_caching": False},
        batches=[[request(0, 1000, 200), request(2000, 900, 200)]],
        abort_after=6,
    )
    assert result["stats"]["requests"]["compressed"] == {"": 2}
    assert result["free_at_start"] - result["free"][0][4] < 40
    assert result["free"][0][-1] == result["free_at_start"]
    assert result["published"] == 0


def test_without_free_blocks_a_request_goes_on_uncompressed_and_is_counted(run_engine):
    """The pool holds the prompt and hardly more, so that no packed prefix fits beside it."""
    engine, batch = {"enable_prefix_caching": False}, [[request(0, 1000, 20)]]
    stock = run_engine(engine=engine, batches=batch)
    little = {"num_gpu_blocks_override": 37, "max_model_len": 1056, "additional_config": ON}
    ours = run_engine(engine=engine | little, batches=batch)
    assert ours["tokens"] == stock["tokens"]
    assert ours["stats"]["deferred"] == {"no_free_blocks": 1}
    assert ours["stats"]["requests"]["compressed"] == {}
    assert ours["stories"][-1]["outcome"] == "skipped" and ours["stories"][-1]["reason"] == "ended_first"
    assert ours["free"][0][-1] == ours["free_at_start"]


def test_a_model_compresses_alike_natively_and_by_transformers(run_engine, first_layers_path):
    """The implementation must not matter to what is asked of the compressed prompt, nor to the report of it."""
    on = {"kv_compression": {"method": "sculpt", "keep_ratio": 0.3, "effort": "fast"}}
    engine = {"additional_config": on} | trained(first_layers_path)
    native, other = (
        run_engine(engine={**engine, "model_impl": impl}, batches=[[request(0, 700, 5, kv_compression_window=64)]])
        for impl in ("vllm", "transformers")
    )
    (one,), (two,) = native["compressions"], other["compressions"]
    assert two["error_before"] == pytest.approx(one["error_before"], rel=0.01)
    assert two["error_after"] == pytest.approx(one["error_after"], rel=0.1)
    assert one["error_after"] < one["error_before"] / 2
    assert other["tokens"] == native["tokens"]
