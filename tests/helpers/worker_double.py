"""What the workers know and hold, without a model: every block's content, and segments that take any number of steps.
It checks that whatever a request reads is its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from kvsculpt_vllm.engine.shared.commands import (
    AdoptCommand,
    CancelCommand,
    CancelLoadCommand,
    CommitCommand,
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
    attached,
)
from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.store.background import StoreAway
from kvsculpt_vllm.store.names import StoredName

BLOCK, GENERATED = 32, 5
"""Tokens of a block, and the token that every answer consists of."""


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

    def __init__(self, store: Store, width: int = 0) -> None:
        """With a `width` there are KV cache groups of windows so wide before and behind that of full attention."""
        self.store, self.width = store, width
        self.group = int(width > 0)
        self.window_rows: dict[str, list[list[int]]] = {}  # block lists in the groups of windows
        self.loading_fails = False
        self.store_state = StoreState()  # as the books have it
        self.cancelled_loads = 0
        self.loading: tuple[LoadCommand, int, int] | None = None  # steps that it still takes, segments that are usable
        self.content: dict[int, list] = {}  # block -> what each slot holds
        self.rows: dict[str, list[int]] = {}
        self.prompts: dict[str, list[int]] = {}
        self.prefixes: dict[str, list[int]] = defaultdict(list)  # as far as they have been asked for
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
            for known in (self.rows, self.window_rows, self.solved, self.sampled):
                known.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            self.rows[new.req_id] = list(new.block_ids[self.group])
            self.window_rows[new.req_id] = [list(row) for row in self.of_windows(new.block_ids)]
            self.prompts[new.req_id] = list(new.prompt_token_ids)
        cached = output.scheduled_cached_reqs
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self.rows[request_id] = []
                self.window_rows[request_id] = [[] for _ in self.of_windows(blocks)]
            self.rows[request_id] += [] if blocks is None else blocks[self.group]
            for row, more in zip(self.window_rows[request_id], self.of_windows(blocks or ()), strict=False):
                row += more
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
            self.fill_windows(request_id, starts[request_id], count)
        return answers

    def of_windows(self, by_group: tuple) -> list:
        """Without what is of full attention."""
        return [*by_group[: self.group], *by_group[self.group + 1 :]]

    def fill_windows(self, request_id: str, start: int, count: int) -> None:
        """Write a step's tokens to windows; what its first one sees there is the request's own."""
        chain = [packed.command.attempt for packed in self.chain_of(request_id)]
        for number, row in enumerate(self.window_rows[request_id]):
            for position in range(max(0, start - self.width + 1), start):
                found = self.content[row[position // BLOCK]][position % BLOCK]
                assert found[:-1] == ("window", number, *self.tag(request_id, position)[1:-1])
                assert found[-1] in (None, *chain)
            for position in range(start, start + count):
                slots = self.content.setdefault(row[position // BLOCK], [None] * BLOCK)
                slots[position % BLOCK] = ("window", number, *self.tag(request_id, position)[1:])

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
            return Solved(command.request_id, command.attempt, succeeded=False, error=2.0, reason=Reason.ERROR_BOUND)
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
        return ("token", self.prefix(request_id, position), behind)

    def prefix(self, request_id: str, position: int) -> int:
        """A number for the tokens up to a position: equal for requests that begin alike."""
        known, prompt = self.prefixes[request_id], self.prompts[request_id]
        while len(known) <= position:
            token = prompt[len(known)] if len(known) < len(prompt) else GENERATED
            known.append(hash((known[-1] if known else None, token)))
        return known[position]

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
        if num_tokens <= first:
            return
        # At once: this is done for every request at every step.
        begin = first // BLOCK * BLOCK
        slots = [slot for block in row[begin // BLOCK : -(-num_tokens // BLOCK)] for slot in self.content[block]]
        slots = slots[first - begin : num_tokens - begin]
        assert len(slots) == num_tokens - first
        self.prefix(request_id, num_tokens - 1)
        known = self.prefixes[request_id][first:num_tokens]
        assert [slot[:-1] for slot in slots] == [("token", prefix) for prefix in known]
        # What was computed before a compression is exact, or behind fewer segments.
        assert {slot[-1] for slot in slots} <= {None, *(packed.command.attempt for packed in chain)}
