"""The real scheduler and block pool, driven at random without a model; a worker double keeps what each block holds.
Its solves take any number of steps.

After every step no block may be lost, owned twice, hashed wrongly, or read by a request that did not write it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm import SamplingParams
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.scheduler.scheduler import SculptAsyncScheduler, SculptScheduler
from kvsculpt_vllm.engine.shared import spans
from kvsculpt_vllm.engine.shared.commands import (
    AdoptCommand,
    CancelCommand,
    CancelLoadCommand,
    CommitCommand,
    Deferred,
    ForgetCommand,
    LoadCommand,
    Loaded,
    PoolState,
    SampleCommand,
    Settled,
    SolveCommand,
    Solved,
    StoreState,
    UnsampleCommand,
    attach,
    attached,
)
from kvsculpt_vllm.engine.shared.prefix_wish import TOKENS, Wish
from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.store.background import StoreAway
from kvsculpt_vllm.store.names import StoredName

BLOCK, NUM_BLOCKS, MAX_TOKENS, GENERATED = 32, 40, 4096, 5
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


@dataclass(frozen=True)
class Packed:
    """What was solved: the command, and all tokens up to the end of what it stands for."""

    command: SolveCommand
    tokens: list[int] = field(default_factory=list)

    @property
    def first(self) -> int:
        """The block it begins with."""
        return self.command.first_token // BLOCK

    @property
    def blocks(self) -> int:
        """That it stands for."""
        return self.command.span_tokens // BLOCK

    @property
    def content(self) -> tuple:
        """What each slot of its blocks holds."""
        return ("packed", self.command.request_id, self.command.attempt)


class Store:
    """What was written, found after some look-ups or never: a double of the store, for scheduler and workers."""

    writable = True

    def __init__(self) -> None:
        self.names: dict[bytes, list[StoredName]] = defaultdict(list)
        self.packed: dict[StoredName, Packed] = {}
        self.late: list[tuple[Future, object]] = []  # answers that are not there yet
        self.away = False
        self.unanswered = 0

    def submit(self, work) -> Future:
        future: Future = Future()
        self.late.append((future, work))
        return future

    def answer(self) -> None:
        """Give the oldest answer that is missing."""
        if self.late:
            future, work = self.late.pop(0)
            self.unanswered += self.away
            future.set_exception(StoreAway()) if self.away else future.set_result(work(self))

    def counts(self) -> StoreState:
        return StoreState(0, self.unanswered, self.away)

    def find(self, parent: bytes, ranks: int) -> list[StoredName]:
        assert ranks == 1
        return list(self.names[parent])

    def avoid(self, name: StoredName, ranks: int) -> None:
        self.names[name.parent] = [other for other in self.names[name.parent] if other != name]

    def save(self, name: StoredName, packed: Packed) -> None:
        assert name.tokens == packed.command.span_tokens and name.blocks == len(packed.command.packed)
        self.names[name.parent].append(name)
        self.packed[name] = packed


class Worker:
    """What the workers would know and hold: block lists, the content of blocks, segments."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.loading_fails = False
        self.store_state = StoreState()  # as the books have it
        self.cancelled_loads = 0
        self.loading: tuple[LoadCommand, int, int] | None = None  # steps that it still takes, segments that are usable
        self.content: dict[int, list] = {}  # block -> what each slot holds
        self.rows: dict[str, list[int]] = {}
        self.prompts: dict[str, list[int]] = {}
        self.chunks: dict[str, int] = {}  # tokens of the last chunk
        self.sampled: dict[str, list[int]] = {}  # request -> first and end of the positions whose queries are kept
        self.solving: tuple[SolveCommand, int, bool] | None = None  # steps that it still takes, whether it fails
        self.lost = 0  # solves that ended with their request
        self.cancelled = 0  # solves that were given up
        self.solved: dict[str, Packed] = {}
        self.directory: dict[int, Packed] = {}  # by the first block
        self.told: Counter[str] = Counter()  # how often the books heard what became of a request
        self.pool: PoolState | None = None

    def execute(self, output, steps: int, fails: bool | str) -> list[Solved | Loaded]:
        """One step; a solve that begins takes so many more, and `fails` says whether it does at the end, or that it
        loses too much.
        """
        for command in attached(output):
            if isinstance(command, CommitCommand):
                self.told[command.request_id] += 1
                solved = self.solved.pop(command.request_id)
                assert command.packed[0] == solved.command.packed[0]
                self.directory[command.packed[0]] = solved
                if command.store_as is not None:
                    self.store.save(command.store_as, solved)
                assert all(solved in self.replace(request_id, row) for request_id, row in command.rows.items())
            elif isinstance(command, AdoptCommand):
                for request_id, row in command.rows.items():
                    assert self.replace(request_id, row)
            elif isinstance(command, ForgetCommand):
                for block in command.first_blocks:
                    self.directory.pop(block, None)
            if isinstance(command, CommitCommand | AdoptCommand):
                for request_id, first in command.samples_from.items():
                    if request_id in self.sampled:
                        self.sampled[request_id][0] = max(self.sampled[request_id][0], first)
        for request_id in [*output.finished_req_ids, *(output.preempted_req_ids or ())]:
            if self.solving is not None and self.solving[0].request_id == request_id:
                self.solving, self.lost = None, self.lost + 1
            for known in (self.rows, self.solved, self.sampled):
                known.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            self.rows[new.req_id] = list(new.block_ids[0])
            self.prompts[new.req_id] = list(new.prompt_token_ids)
        cached = output.scheduled_cached_reqs
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self.rows[request_id] = []
            self.rows[request_id] += [] if blocks is None else blocks[0]
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        answers = []
        for command in attached(output):
            if isinstance(command, SampleCommand):
                # Of this step's tokens, and without a gap.
                start = starts[command.request_id]
                assert start == command.first < command.end <= start + output.num_scheduled_tokens[command.request_id]
                # A GPU would not sample the query of a single token.
                assert command.end - command.first > 1
                kept = self.sampled.setdefault(command.request_id, [command.first, command.first])
                assert kept[1] == command.first
                kept[1] = command.end
            elif isinstance(command, UnsampleCommand):
                for request_id in command.request_ids:
                    self.sampled.pop(request_id, None)
            elif isinstance(command, SolveCommand):
                self.begin(command, steps, fails)
            elif isinstance(command, CancelLoadCommand):
                self.cancelled_loads += 1
                if self.loading is not None and self.loading[0].number == command.number:
                    self.loading = None
                for block in command.first_blocks:
                    self.directory.pop(block, None)
            elif isinstance(command, LoadCommand):
                assert self.loading is None
                self.loading_fails = bool(fails) or steps == 1
                self.loading = command, steps, len(command.names) - self.loading_fails
            elif isinstance(command, CancelCommand):
                if self.solving is not None and self.solving[0].request_id == command.request_id:
                    self.solving, self.cancelled = None, self.cancelled + 1
                self.solved.pop(command.request_id, None)
            elif isinstance(command, Settled):
                self.told[command.request_id] += 1
            elif isinstance(command, PoolState):
                self.pool = command
            elif isinstance(command, StoreState):
                self.store_state = command
        assert self.store_state == self.store.counts()
        if self.loading is not None:
            load, left, usable = self.loading
            self.loading = load, left - 1, usable
            if left == 0:
                self.loading = None
                answers.append(self.publish(load, usable))
        if self.solving is not None:
            command, left, failed = self.solving
            self.solving = command, left - 1, failed
            if left == 0:
                self.solving = None
                answers.append(self.conclude(command, failed))
        for request_id, count in output.num_scheduled_tokens.items():
            self.chunks[request_id] = count
            for position in range(starts[request_id], starts[request_id] + count):
                slots = self.content.setdefault(self.rows[request_id][position // BLOCK], [None] * BLOCK)
                slots[position % BLOCK] = self.tag(request_id, position)
            self.check(request_id, starts[request_id] + count)
        return answers

    def begin(self, command: SolveCommand, steps: int, fails: bool | str) -> None:
        """A solve begins: all that it needs is there."""
        first, end = command.first_token, command.first_token + command.span_tokens + command.window
        kept = self.sampled[command.request_id]
        assert kept[0] <= first and end <= kept[1]
        self.check(command.request_id, end)
        row = self.rows[command.request_id]
        assert command.exact == row[first // BLOCK : -(-end // BLOCK)]
        chain = self.chain_of(command.request_id)
        assert command.earlier == [packed.command.packed for packed in chain]
        assert first == sum(packed.command.span_tokens for packed in chain)
        assert self.solving is None
        self.solving = command, steps, fails

    def conclude(self, command: SolveCommand, failed: bool | str) -> Solved:
        """A solve ends. One that fails may have written, too."""
        packed = Packed(command, self.tokens(command.request_id, command.first_token + command.span_tokens))
        for block in command.packed:
            self.content[block] = [packed.content] * BLOCK
        if failed == "loses too much":
            return Solved(command.request_id, command.attempt, succeeded=False, reason=Reason.ERROR_BOUND)
        if failed:
            self.told[command.request_id] += 1
            return Solved(command.request_id, command.attempt, succeeded=False, reason=Reason.EXCEPTION, told=True)
        self.solved[command.request_id] = packed
        return Solved(command.request_id, command.attempt)

    def publish(self, load: LoadCommand, usable: int) -> Loaded:
        """A load ends. What is unusable may have been written, too."""
        for name, blocks in zip(load.names, load.packed, strict=True):
            stored = self.store.packed[name]
            packed = replace(stored, command=replace(stored.command, packed=blocks))
            for block in blocks:
                self.content[block] = [packed.content] * BLOCK
            if load.names.index(name) < usable:
                self.directory[blocks[0]] = packed
        return Loaded(load.number, usable)

    def replace(self, request_id: str, commanded: list[int]) -> list[Packed]:
        """A new block list for a request; returns the segments that it begins with."""
        row = self.rows[request_id]
        row[: len(commanded)] = commanded
        chain = self.chain_of(request_id)
        for packed in chain:
            packed_end = packed.first + len(packed.command.packed)
            assert commanded[packed.first : packed_end] == packed.command.packed
            assert not any(commanded[packed_end : packed.first + packed.blocks])
            # It stands for the same tokens.
            assert self.tokens(request_id, len(packed.tokens)) == packed.tokens
        return chain

    def tokens(self, request_id: str, count: int) -> list[int]:
        """The first tokens of a request: all that is generated is the same token."""
        return [*self.prompts[request_id], *[GENERATED] * (count - len(self.prompts[request_id]))][:count]

    def tag(self, request_id: str, position: int) -> tuple:
        """What a slot holds: a token that knows its prefix, and the segment that it was computed behind."""
        chain = self.chain_of(request_id)
        behind = chain[-1].command.attempt if chain else None
        return ("token", hash(tuple(self.tokens(request_id, position + 1))), behind)

    def chain_of(self, request_id: str) -> list[Packed]:
        """The segments that the request's row begins with."""
        row, chain, column = self.rows.get(request_id, []), [], 0
        while column < len(row) and (packed := self.directory.get(row[column])) is not None:
            assert packed.first == column
            chain.append(packed)
            column += packed.blocks
        return chain

    def check(self, request_id: str, num_tokens: int) -> None:
        """Everything that the request would attend to is its own."""
        row, chain, first = self.rows[request_id], self.chain_of(request_id), 0
        for packed in chain:
            first = len(packed.tokens)
            assert packed.tokens == self.tokens(request_id, first)
            assert all(slot == packed.content for block in packed.command.packed for slot in self.content[block])
            assert row[packed.first : packed.first + len(packed.command.packed)] == packed.command.packed
        for position in range(first, num_tokens):
            found = self.content[row[position // BLOCK]][position % BLOCK]
            # What was computed before a compression is exact, or behind fewer segments.
            assert found[:-1] == self.tag(request_id, position)[:-1]
            assert found[-1] in (None, *(packed.command.attempt for packed in chain))


class Machine(RuleBasedStateMachine):
    """Arrivals, chunked prefill, prefix hits, compression, failures, aborts, preemption, cache resets."""

    seen: ClassVar[Counter] = Counter()

    # The fewest have no room beside a lone prompt for what it is packed into.
    @initialize(
        asynchronous=st.booleans(),
        blocks=st.sampled_from([22, 23]) | st.integers(22, NUM_BLOCKS),
        depth=st.integers(1, 3),
        store=st.just(True),
    )
    def start(self, asynchronous, blocks, depth=1, segment=SETTINGS["segment"], store=False):
        self.config.additional_config = {"kv_compression": SETTINGS | {"segment": segment}}
        text_config = self.config.model_config.hf_text_config
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=text_config.num_key_value_heads, head_size=64, dtype=torch.bfloat16
        )
        scheduler = SculptAsyncScheduler if asynchronous else SculptScheduler
        self.config.scheduler_config.async_scheduling = asynchronous
        self.config.cache_config.num_gpu_blocks = blocks
        self.scheduler = scheduler(
            vllm_config=self.config,
            kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK,
        )
        # Steps that are scheduled before the first one's tokens are known.
        self.depth = depth if asynchronous else 0
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.blocks, self.worker, self.count = blocks, Worker(Store()), 0
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
    @precondition(lambda self: len(self.scheduler.requests) < 3)
    def arrive_longer_than_the_memory(self, length, generate):
        config = CompressionConfig(**SETTINGS)
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
        ttl=st.sampled_from([None, None, 0.001]),
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
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        owners = Counter(b.block_id for blocks in manager.req_to_blocks.values() for b in blocks if not b.is_null)
        owners.update(b.block_id for pending in self.scheduler._pending.values() for b in pending.packed)
        load = self.scheduler._load
        owners.update(b.block_id for blocks in (load.packed if load else ()) for b in blocks)
        pinned = (prefix for prefix in self.scheduler._prefixes._prefixes.values() if prefix.pinned)
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
