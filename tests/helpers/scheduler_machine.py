"""The real scheduler and block pool, driven at random without a model, with a double of the workers.

After every step no block may be lost, owned twice, hashed wrongly, or read by a request that did not write it.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm import SamplingParams
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.scheduler.scheduler import SculptAsyncScheduler, SculptScheduler
from kvsculpt_vllm.engine.shared import spans
from kvsculpt_vllm.engine.shared.commands import (
    CommitCommand,
    Deferred,
    ForgetCommand,
    LoadCommand,
    PoolState,
    Settled,
    Solved,
    attach,
    attached,
)
from kvsculpt_vllm.engine.shared.prefix_wish import TOKENS, Wish
from kvsculpt_vllm.engine.shared.reasons import Reason
from worker_double import BLOCK, GENERATED, Store, Worker

NUM_BLOCKS, MAX_TOKENS = 40, 4096
EVENTS = (
    "commit",
    "adopted",
    "evicted",
    "failure",
    "abort of a pending one",
    "loss in the middle of a solve",
    "preemption",
    "hit",
    "deferral",
    "rewound",
    "chain",
    "found",
    "read",
    "unreadable",
    "prefix",
    "pin",
    "no room to pin",
)
SETTINGS = {"method": "select", "keep_ratio": 0.3, "min_tokens": 64, "window": 32, "segment": 256, "decode": 256}
SETTINGS |= {"pin_blocks": 4}


class Machine(RuleBasedStateMachine):
    """Arrivals, chunked prefill, prefix hits, compression, failures, aborts, preemption, cache resets."""

    seen: ClassVar[Counter] = Counter()
    width: ClassVar[int] = 0
    """Tokens that the layers of two more KV cache groups see; 0 means that there are none."""

    # The fewest have no room beside a lone prompt for what it is packed into.
    @initialize(
        asynchronous=st.booleans(),
        blocks=st.sampled_from([22, 23]) | st.integers(22, NUM_BLOCKS),
        depth=st.integers(1, 3),
        store=st.just(True),
        written=st.sampled_from([0.0, 0.6]),
    )
    def start(self, asynchronous, blocks, depth=1, segment=SETTINGS["segment"], store=False, written=0.0):
        pins = {"pin_blocks": 14} if self.width else {}  # a pin holds what windows hold before its end, too
        self.settings = SETTINGS | {"segment": segment, "decode_keep_ratio": written} | pins
        self.config.additional_config = {"kv_compression": self.settings}
        text_config = self.config.model_config.hf_text_config
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=text_config.num_key_value_heads, head_size=64, dtype=torch.bfloat16
        )
        groups = [KVCacheGroupSpec(["layer"], spec)]
        if self.width:
            window = SlidingWindowSpec(
                block_size=BLOCK,
                num_kv_heads=spec.num_kv_heads,
                head_size=spec.head_size,
                dtype=spec.dtype,
                sliding_window=self.width,
            )
            groups = [KVCacheGroupSpec(["a"], window), *groups, KVCacheGroupSpec(["b"], window)]
        scheduler = SculptAsyncScheduler if asynchronous else SculptScheduler
        self.config.scheduler_config.async_scheduling = asynchronous
        self.config.cache_config.num_gpu_blocks = blocks
        self.scheduler = scheduler(
            vllm_config=self.config,
            kv_cache_config=KVCacheConfig(blocks, [], groups),
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK,
        )
        # Not the time of day: the same choices have to lead to the same place.
        self.steps, self.scheduler._prefixes.now = 0, lambda: float(self.steps)
        # Steps that are scheduled before the first one's tokens are known.
        self.depth = depth if asynchronous else 0
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.blocks, self.worker, self.count = blocks, Worker(Store(), self.width), 0
        if store:
            self.scheduler._store, self.scheduler._names._lasting = self.worker.store, True
        self.in_flight, self.hashed = [], {}

    @rule(
        length=st.integers(20, 560) | st.integers(500, 560),  # the longest leave no room for what they are packed into
        family=st.integers(0, 2),
        shared=st.integers(0, 560),
        generate=st.integers(1, 60),
        compress=st.sampled_from([None, None, None, "none"]),
    )
    @precondition(lambda self: len(self.scheduler.requests) < 8)
    def arrive(self, length, family, shared, generate, compress):
        """A prompt that begins like the others of its family."""
        shared = min(shared, length)
        tokens = [family * 1000 + i % 900 for i in range(shared)]
        tokens += [20_000 + 700 * self.count + i for i in range(length - shared)]
        self.add(tokens, generate, compress)

    @rule(length=st.integers(100, 400), more=st.integers(1, 40), compress=st.sampled_from([None, "none"]))
    @precondition(lambda self: len(self.scheduler.requests) < 3)
    def arrive_as_twins(self, length, more, compress):
        prompt = [10_000 * (1 + self.count) + i for i in range(length)]
        self.add(prompt, 40, None)
        self.add([*prompt, *[9001 + self.count] * more], 40, compress)

    @rule(data=st.data(), more=st.integers(1, 200), compress=st.sampled_from([None, None, "none"]))
    @precondition(lambda self: self.worker.directory and len(self.scheduler.requests) < 6)
    def arrive_with_a_prompt_that_was_sculpted(self, data, more, compress):
        first_block = data.draw(st.sampled_from(sorted(self.worker.directory)))
        tokens = self.worker.directory[first_block].tokens[:560]
        self.add(tokens + [9001 + self.count] * more, 20, compress)

    @rule(length=st.integers(600, 1500), generate=st.integers(1, 20))
    @precondition(lambda self: len(self.scheduler.requests) < 3 and not self.width)
    def arrive_longer_than_the_memory(self, length, generate):
        config = CompressionConfig(**self.settings)
        while spans.most_blocks(config, length + generate, BLOCK) > self.blocks - 3:
            length -= 50
        self.add([30_000 + 2000 * self.count + i for i in range(length)], generate, None)

    @rule(length=st.integers(40, 300), generate=st.integers(300, 450))
    @precondition(lambda self: len(self.scheduler.requests) < 4)
    def write_a_long_answer(self, length, generate):
        self.add([30_000 + 2000 * self.count + i for i in range(length)], generate, None)

    @rule(data=st.data(), more=st.integers(1, 200))
    @precondition(lambda self: self.worker.store.packed and len(self.scheduler.requests) < 6)
    def arrive_with_a_prompt_that_was_stored(self, data, more):
        stored = data.draw(st.sampled_from(sorted(self.worker.store.packed.values(), key=lambda p: p.tokens)))
        self.reset_cache(running=data.draw(st.booleans()))  # so that it is not found in memory, mostly
        self.add(stored.tokens[:560] + [9001 + self.count] * more, 20, None)

    @rule(
        length=st.integers(100, 560),
        family=st.integers(0, 2),
        pin=st.booleans(),
        ttl=st.sampled_from([None, None, 3.0]),  # seconds, of which a step takes one
    )
    @precondition(lambda self: len(self.scheduler.requests) < 6)
    def have_a_prefix_sculpted(self, length, family, pin, ttl):
        wish = Wish(f"p{self.count}", pin=pin, ttl=ttl)
        self.add([family * 1000 + i % 900 for i in range(length)], TOKENS, None, wish)

    @rule(data=st.data())
    @precondition(lambda self: self.scheduler._prefixes._prefixes)
    def remove_a_prefix(self, data):
        prefix_id = data.draw(st.sampled_from(sorted(self.scheduler._prefixes._prefixes)))
        assert self.scheduler.remove_prefix(prefix_id)

    @rule(reset=st.booleans())
    @precondition(lambda self: self.scheduler._load)
    def what_is_being_read_is_not_wanted_any_more(self, reset):
        if reset:
            self.reset_cache(running=True)
        elif self.scheduler._load.request_id in self.scheduler.requests:
            self.scheduler.finish_requests(self.scheduler._load.request_id, RequestStatus.FINISHED_ABORTED)

    @rule(away=st.booleans())
    @precondition(lambda self: self.scheduler._store is not None)
    def the_store_comes_and_goes(self, away):
        self.worker.store.away = away

    def add(self, tokens, generate, compress, wish=None):
        self.count += 1
        extra_args = {} if compress is None else {"kv_compression": compress}
        params = SamplingParams(
            max_tokens=generate,
            ignore_eos=True,
            extra_args=extra_args | (wish.as_extra_arg() if wish else {}),
        )
        params.update_from_generation_config({}, eos_token_id=0)
        self.scheduler.add_request(Request(f"r{self.count}", tokens, params, None, block_hasher=self.hasher))

    @rule(steps=st.integers(0, 6), fails=st.sampled_from([False, False, False, False, True, "loses too much"]))
    @precondition(lambda self: self.scheduler.has_requests() or self.in_flight)
    def step(self, steps, fails):
        """Schedule one step, execute it, and hear of the oldest one in flight."""
        self.steps += 1
        if steps < 5:
            self.worker.store.answer()
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            answers = self.worker.execute(output, steps, fails)
            self.seen["loss in the middle of a solve"] += self.worker.lost
            self.seen["cancel"] += self.worker.cancelled
            self.worker.lost = self.worker.cancelled = 0
            self.seen["commit"] += sum(isinstance(command, CommitCommand) for command in attached(output))
            settled = [command.reason for command in attached(output) if isinstance(command, Settled)]
            self.seen["found"] += settled.count(Reason.CACHED)
            self.seen["adopted"] += settled.count(Reason.ADOPTED)
            self.seen["evicted"] += sum(len(c.first_blocks) for c in attached(output) if isinstance(c, ForgetCommand))
            self.seen["rewound"] += sum(
                request_id in self.scheduler._rewound_at for request_id in output.preempted_req_ids or ()
            )
            held = map(len, self.scheduler._segments._held.values())
            self.seen["chain"] += any(length > 1 for length in held)
            solved = [answer for answer in answers if isinstance(answer, Solved)]
            self.seen["failure"] += sum(not answer.succeeded for answer in solved)
            loads = [command for command in attached(output) if isinstance(command, LoadCommand)]
            self.seen["read"] += len(loads)
            self.seen["cancelled load"] += self.worker.cancelled_loads
            self.worker.cancelled_loads = 0
            self.seen["unreadable"] += bool(loads) and self.worker.loading_fails
            kept = self.scheduler._prefixes._prefixes.values()
            self.seen["prefix"] += any(prefix.chain for prefix in kept)
            self.seen["pin"] += any(prefix.pinned for prefix in kept)
            self.seen["no room to pin"] += any(p.wish.pin and p.chain and not p.pinned for p in kept)
            self.seen["deferral"] += sum(isinstance(command, Deferred) for command in attached(output))
            self.seen["preemption"] += len(output.preempted_req_ids or ())
            self.seen["hit"] += any(new.num_computed_tokens for new in output.scheduled_new_reqs)
            ids = list(output.num_scheduled_tokens)
            self.in_flight.append((output, ids, answers))
        while len(self.in_flight) > (self.depth if self.scheduler.has_requests() else 0):
            self.hear(*self.in_flight.pop(0))

    def hear(self, output, ids, answers):
        sampled = []
        for request_id in ids:
            request = self.scheduler.requests.get(request_id)
            done = request is not None and not output_is_chunk(output, request, request_id)
            sampled.append([GENERATED] if done else [])
        result = ModelRunnerOutput(ids, {request_id: i for i, request_id in enumerate(ids)}, sampled)
        attach(result, answers)
        self.scheduler.update_from_output(output, result)

    @rule(data=st.data())
    @precondition(lambda self: self.scheduler.requests)
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    @rule(data=st.data())
    @precondition(lambda self: self.scheduler._pending)
    def abort_between_the_phases(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.scheduler._pending)))
        self.seen["abort of a pending one"] += 1
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    @rule(running=st.booleans())
    def reset_cache(self, running):
        if not self.in_flight:
            self.scheduler.reset_prefix_cache(reset_running_requests=running)

    @invariant()
    def every_block_is_owned_as_often_as_it_says(self):
        if not hasattr(self, "scheduler"):
            return
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        rows = [blocks for manager in managers for blocks in manager.req_to_blocks.values()]
        owners = Counter(b.block_id for blocks in rows for b in blocks if not b.is_null)
        owners.update(b.block_id for pending in self.scheduler._pending.values() for b in pending.packed)
        load = self.scheduler._load
        owners.update(b.block_id for blocks in (load.packed if load else ()) for b in blocks)
        pinned = [prefix for prefix in self.scheduler._prefixes._prefixes.values() if prefix.pinned]
        owners.update(b.block_id for prefix in pinned for b in prefix.before)
        owners.update(b.block_id for prefix in pinned for segment in prefix.chain for b in segment.packed)
        for block in self.pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == owners[block.block_id]
        assert self.pool.get_num_free_blocks() == self.blocks - 1 - len(owners)
        assert self.pool.null_block not in self.pool.free_block_queue.get_all_free_blocks()
        assert set(self.scheduler._pending) <= set(self.scheduler.requests)

    @invariant()
    def a_hashed_block_keeps_its_content_and_no_packed_block_is_hashed(self):
        if not hasattr(self, "scheduler"):
            return
        hashed = {}
        for block in self.pool.blocks:
            if block.block_hash is not None and not block.is_null and not self.in_flight:
                content = list(self.worker.content[block.block_id])
                before = self.hashed.get(block.block_id)
                assert before is None or before[0] != block.block_hash or before[1] == content
                hashed[block.block_id] = (block.block_hash, content)
        if not self.in_flight:
            self.hashed = hashed

    @invariant()
    def the_directory_knows_what_packed_blocks_hold(self):
        if hasattr(self, "scheduler") and not self.in_flight:
            published = {segment.packed[0].block_id for segment in self.scheduler._segments.alive()}
            assert self.scheduler._prefixes.pinned_blocks <= self.scheduler._prefixes.most_pinned
            ended = set(self.scheduler._segments._gone)  # the workers hear of them before the next step
            assert set(self.worker.directory) - ended == published
            for segment in self.scheduler._segments.alive():
                packed = self.worker.directory[segment.packed[0].block_id]
                assert packed.command.packed == [block.block_id for block in segment.packed]
                held = (slot for block in packed.command.packed for slot in self.worker.content[block])
                assert all(slot == packed.content for slot in held)

    def teardown(self):
        """Let everything finish: all blocks come back."""
        if not hasattr(self, "scheduler"):
            return
        for number in range(2000):
            if not (self.scheduler.has_requests() or self.in_flight):
                break
            self.step(number % 2, fails=False)  # of the loads every other one fails
        assert not self.scheduler.has_requests()
        for prefix_id in list(self.scheduler._prefixes._prefixes):
            self.scheduler.remove_prefix(prefix_id)
        self.worker.execute(self.scheduler.schedule(), 0, fails=False)
        assert self.pool.get_num_free_blocks() == self.blocks - 1
        assert not self.worker.solved and not self.worker.solving and not self.scheduler._pending
        # The books know of every request, and of an empty pool.
        assert set(self.worker.told) == {f"r{i + 1}" for i in range(self.count)}
        segments = len(self.scheduler._segments)
        assert self.worker.pool == PoolState(self.blocks - 1, 0, 0, 0, 0, segments)
        # Nothing is remembered of a request that has gone.
        known = vars(self.scheduler)
        forgotten = (
            *("configs", "whys", "known", "spans", "looked_at", "pending", "times_made", "stories", "told", "failed"),
            *("steps_waited", "shared", "shortened", "rewound", "rewound_at", "refused", "found", "renamed"),
            *("look_ups", "new_loads"),
        )
        assert not any(known[f"_{name}"] for name in forgotten)
        assert not self.scheduler._samples._kept and not self.worker.sampled
        assert not any(vars(self.scheduler._windows)[name] for name in ("_before", "_passed"))
        assert not any(vars(self.scheduler._stock_blocks)[name] for name in ("_holders", "_counted", "_names"))
        # What is kept for others can be dropped.
        assert self.scheduler.reset_prefix_cache()
        self.worker.execute(self.scheduler.schedule(), 0, fails=False)
        assert not self.worker.directory and not len(self.scheduler._segments)


def output_is_chunk(output, request, request_id) -> bool:
    """Whether the step computed a part of what is known that is not its end, so that no token is sampled."""
    computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return computed[request_id] + output.num_scheduled_tokens[request_id] < request.num_tokens
