"""Which segment a prompt finds, on vLLM's real block pool, and when a segment has ended."""

from types import SimpleNamespace

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.block_pool import BlockPool

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.scheduler.segments import Segment, Segments

BLOCK, SPAN = 16, 320
SCULPT = CompressionConfig(method="sculpt")
TOKENS = list(range(SPAN + 200))


def request(tokens=TOKENS, cache_salt=None, lora=None, mm_features=(), embeds=None):
    return SimpleNamespace(
        prompt_token_ids=list(tokens),
        all_token_ids=list(tokens),
        num_tokens=len(tokens),
        cache_salt=cache_salt,
        lora_request=lora,
        mm_features=list(mm_features),
        prompt_embeds=embeds,
    )


@pytest.fixture
def pool():
    return BlockPool(num_gpu_blocks=40, enable_caching=True, hash_block_size=BLOCK)


def made(segments, pool, of=None, config=SCULPT, tokens=SPAN, blocks=4, holder="maker", error=0.1, behind=None):
    """A segment of a request's first tokens, or of those behind another segment, just solved."""
    of = of or request()
    parent, first = (segments.root(of, config), 0) if behind is None else (behind.key, behind.end * BLOCK)
    key = segments.key(parent, of, first, first + tokens)
    segment = Segment(
        key=key,
        parent=parent,
        first=first // BLOCK,
        blocks=tokens // BLOCK,
        tokens=tokens,
        packed=pool.get_new_blocks(blocks),
        effort=config.effort,
        error=error,
        shared=True,
    )
    segments.add(segment, holder)
    return segment


def found(segments, of, config=SCULPT):
    """The chain that a request finds: it keeps the window exact."""
    return segments.find(of, config, of.num_tokens - config.window)


def let_go(segments, pool, segment, holder="maker"):
    segments.release(holder)
    pool.free_blocks(reversed(segment.packed))


def make(pool, most=100, calibration="none"):
    return Segments(pool, "model", calibration, BLOCK, most, lambda lora: lora.lora_path)


LORA = LoRARequest("a", 1, "/a")


@pytest.mark.parametrize(
    ("other", "config", "is_found"),
    [
        (request(), SCULPT, True),
        (request([*TOKENS[:SPAN], *[7] * 90]), SCULPT, True),  # another question about the same document
        (request([*TOKENS[: SPAN - 1], 9, *[7] * 90]), SCULPT, False),  # another document
        (request([*TOKENS[:SPAN], *[7] * 63]), SCULPT, False),  # its last 64 tokens are to stay exact
        (request(), SCULPT.model_copy(update={"effort": "fast"}), True),
        (request(), SCULPT.model_copy(update={"effort": "thorough"}), False),  # it took less
        (request(), SCULPT.model_copy(update={"keep_ratio": 0.5}), False),
        (request(), SCULPT.model_copy(update={"keep_tokens": 300}), False),
        (request(), SCULPT.model_copy(update={"method": "select"}), False),
        (request(), SCULPT.model_copy(update={"budget": "uniform"}), False),
        (request(), SCULPT.model_copy(update={"sink": 8}), False),
        (request(), SCULPT.model_copy(update={"max_error": 0.05}), False),  # it lost 0.1
        (request(), SCULPT.model_copy(update={"window": 300}), False),
        (request(cache_salt="tenant"), SCULPT, False),
        (request(lora=LORA), SCULPT, False),
        (request(mm_features=["an image"]), SCULPT, False),
        (request(embeds="the tokens are placeholders"), SCULPT, False),
    ],
)
def test_only_who_would_be_given_the_same_finds_it(pool, other, config, is_found):
    segments = make(pool)
    segment = made(segments, pool)
    assert found(segments, other, config) == ([segment] if is_found else [])


@pytest.mark.parametrize("of", [request(cache_salt="tenant"), request(lora=LORA)])
def test_those_of_one_tenant_or_adapter_find_theirs(pool, of):
    segments = make(pool)
    segment = made(segments, pool, of)
    assert found(segments, of) == [segment]
    assert found(segments, request()) == []


def test_another_calibration_is_another_segment(pool):
    ours, others = make(pool), make(pool, calibration="/else.json")
    assert ours.root(request(), SCULPT) != others.root(request(), SCULPT)


def test_the_longest_is_found_that_leaves_the_window_exact(pool):
    segments = make(pool)
    short, long = made(segments, pool, tokens=160, holder="a"), made(segments, pool, tokens=SPAN, holder="b")
    assert found(segments, request()) == [long]
    assert found(segments, request(TOKENS[: SPAN + 63])) == [short]
    assert found(segments, request(TOKENS[:200])) == []


def test_a_chain_is_found_as_far_as_it_goes_whatever_its_cuts(pool):
    segments = make(pool)
    first = made(segments, pool, tokens=160, blocks=2)
    second = made(segments, pool, tokens=96, blocks=2, behind=first)
    third = made(segments, pool, tokens=112, blocks=2, behind=second)
    assert found(segments, request()) == [first, second, third]
    assert found(segments, request([*TOKENS[:300], *[7] * 300])) == [first, second]
    assert found(segments, request([*TOKENS[:200], *[7] * 300])) == [first]
    # The same tokens cut elsewhere are another chain: entries behind one are not entries behind another.
    assert segments.key(first.parent, request(), 0, 256) != second.key
    # The one in the middle has gone: what follows it cannot be reached.
    let_go(segments, pool, second)
    pool.evict_blocks({second.packed[0].block_id})
    segments._end(second)
    assert found(segments, request()) == [first]


def test_a_request_holds_its_chain_and_lets_all_of_it_go(pool):
    segments = make(pool)
    first = made(segments, pool, tokens=160, blocks=2)
    second = made(segments, pool, tokens=96, blocks=2, behind=first)
    assert segments.chain_of("maker") == [first, second]
    segments.release("maker")
    assert segments.chain_of("maker") == [] and first.holders == second.holders == set()


def test_it_outlives_its_holders_until_the_pool_needs_a_block_of_it(pool):
    segments = make(pool)
    segment = made(segments, pool)
    let_go(segments, pool, segment)
    assert found(segments, request()) == [segment] and segments.gone() == []
    assert all(block.ref_cnt == 0 for block in segment.packed)
    pool.get_new_blocks(pool.get_num_free_blocks() - 3)  # of the four, the one that was freed first
    assert found(segments, request()) == []
    assert segments.gone() == [segment.packed[0].block_id] and segments.gone() == []
    # What is left of it is free as any block, and found by nobody.
    assert all(block.block_hash is None for block in segment.packed)
    assert pool.get_num_free_blocks() == 3


def test_held_ones_stay_whatever_the_pool_needs(pool):
    segments = make(pool)
    segment = made(segments, pool)
    pool.get_new_blocks(pool.get_num_free_blocks())
    assert found(segments, request()) == [segment] and segments.gone() == []


def test_reset_of_the_prefix_cache_drops_all(pool):
    segments = make(pool)
    segment = made(segments, pool)
    assert not pool.reset_prefix_cache()  # held
    let_go(segments, pool, segment)
    assert pool.reset_prefix_cache()
    assert found(segments, request()) == [] and len(segments) == 0
    assert segments.gone() == [segment.packed[0].block_id]


def test_the_one_used_longest_ago_makes_room_in_the_directory(pool):
    segments = make(pool, most=2)
    first, second = (made(segments, pool, request([i, *TOKENS])) for i in (1, 2))
    for segment in (first, second):
        let_go(segments, pool, segment)
    segments.hold(first, "reader")
    segments.release("reader")
    third = made(segments, pool, request([3, *TOKENS]))
    assert [segment.alive for segment in (first, second, third)] == [True, False, True]


def test_without_prefix_caching_nothing_is_shared_and_a_segment_ends_with_its_holder():
    pool = BlockPool(num_gpu_blocks=40, enable_caching=False, hash_block_size=BLOCK)
    segments = make(pool)
    assert segments.root(request(), SCULPT) is None
    blocks = SPAN // BLOCK
    segment = Segment(b"", b"", 0, blocks, SPAN, pool.get_new_blocks(4), "fast", 0.1, shared=False)
    segments.add(segment, "maker")
    assert found(segments, request()) == []
    assert segments.chain_of("maker") == [segment] and segments.gone() == []
    segments.release("maker")
    assert segments.gone() == [segment.packed[0].block_id]


def test_one_that_took_more_takes_the_place_of_one_that_nobody_holds(pool):
    segments = make(pool)
    fast = made(segments, pool, config=SCULPT.model_copy(update={"effort": "fast"}))
    let_go(segments, pool, fast)
    better = made(segments, pool)
    assert not fast.alive and found(segments, request()) == [better]
    # What was computed behind the one is not found behind the other.
    assert fast.key == better.key and fast.name != better.name


def test_made_twice_at_once_the_first_one_is_found_and_the_second_serves_its_own(pool):
    segments = make(pool)
    first, second = made(segments, pool, holder="a"), made(segments, pool, holder="b")
    assert found(segments, request()) == [first]
    assert segments.chain_of("b") == [second]
    let_go(segments, pool, second, "b")
    assert segments.gone() == [second.packed[0].block_id]
    assert found(segments, request()) == [first]
