"""vLLM's scheduler and its block lists, by public names."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

from vllm.outputs import RequestError
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import RequestStatus

from kvsculpt_vllm.engine.compat.frontend import ASK_SCHEDULER, QUESTIONS
from kvsculpt_vllm.engine.compat.patcher import apply
from kvsculpt_vllm.engine.compat.patches import ALLOCATE_SLOTS
from kvsculpt_vllm.engine.shared.groups import full_group

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request
else:
    Scheduler = object  # of two: the mixin goes over either

NO_ROOM = "the request has more tokens than the KV cache's memory holds, and could not be compressed to what it holds"
"""What the client of a request learns that is ended because it can go on neither compressed nor exact."""

NEVER_HASH = 1 << 30
"""More cached blocks than a request can have: vLLM then never hashes the approximated tail."""


def insert_hash(
    pool: BlockPool, block_hash: BlockHash, block: KVCacheBlock, num_tokens: int | None = None, group: int = 0
) -> None:
    """Name the content of a KV cache group's block, so that `pool.get_cached_block` finds it until the pool needs its
    memory.

    Can go when vLLM's pool lets a block be cached under a hash that is not of a request's tokens.
    """
    pool._insert_block_hash(make_block_hash_with_group_id(block_hash, group), block, num_tokens)


def when_reused(pool: BlockPool, block: KVCacheBlock, do: Callable[[KVCacheBlock], None]) -> None:
    """Call `do` when the pool gives the block's memory to something else, or drops all that is cached.

    Can go when vLLM's pool tells publicly.
    """
    pool._reuse_watchers[block.block_id] = do


def name_from(request: Request, index: int, name: BlockHash) -> None:
    """Hash the request's blocks from `index` on as those of a prefix called `name`, not as those of its tokens.

    A block's hash covers the one before it: with `name` in the place before `index` all that follow are its own.
    """
    del request.block_hashes[index - 1 :]
    request.block_hashes.append(name)
    request.update_block_hashes()


def name_by_tokens(request: Request) -> None:
    """Hash all of the request's blocks by its tokens, as vLLM does."""
    request.block_hashes.clear()
    request.update_block_hashes()


class GroupLists:
    """The block lists of running requests in one KV cache group.

    Can go when vLLM's KV cache manager lets a request's leading blocks be replaced.
    """

    def __init__(self, manager: KVCacheManager, group: int) -> None:
        self.pool, self.group = manager.block_pool, group
        self._manager = manager.coordinator.single_type_managers[group]

    def of(self, request_id: str) -> list[KVCacheBlock]:
        """The request's blocks, in the order of its tokens; empty for one that has none."""
        return self._manager.req_to_blocks.get(request_id, [])

    def stop_naming(self, request_id: str) -> None:
        """Have vLLM hash no block of a request from now on."""
        self._manager.num_cached_block[request_id] = NEVER_HASH

    def rename(self, request: Request, first: int, left: Container[int] = ()) -> None:
        """Hash the request's full blocks from index `first` on as the request calls them now; vLLM goes on from there.

        Those that others hold keep the name that they were found by, and those whose numbers are in `left` keep theirs.
        """
        blocks, size = self.of(request.request_id), self._manager.block_size
        full = min(len(request.block_hashes), request.num_computed_tokens // size, len(blocks))
        for index in range(first, full):
            block = blocks[index]
            if block.ref_cnt == 1 and not block.is_null and block.block_id not in left:
                self.pool.evict_blocks({block.block_id})
                insert_hash(self.pool, request.block_hashes[index], block, (index + 1) * size, self.group)
        self._manager.num_cached_block[request.request_id] = max(first, full)


class WindowLists(GroupLists):
    """The same of layers that see a window: what is before it is the null block."""

    @property
    def reach(self) -> int:
        """Blocks before a block that its first token sees."""
        spec = self._manager.kv_cache_spec
        assert isinstance(spec, SlidingWindowSpec)  # see `refusals.groups.check_kv_cache_config`
        return -(-(spec.sliding_window - 1) // spec.block_size)

    @property
    def most(self) -> int:
        """Blocks that one request holds at most."""
        return self._manager.max_admission_blocks_per_request or 0


class BlockLists(GroupLists):
    """The block lists of the layers that see everything, and beside them those of windows, in groups of their own."""

    def __init__(self, manager: KVCacheManager) -> None:
        groups = manager.kv_cache_config.kv_cache_groups
        super().__init__(manager, full_group(groups))
        self.windows = [WindowLists(manager, group) for group in range(len(groups)) if group != self.group]

    def replace(self, request_id: str, first: int, row: list[KVCacheBlock]) -> list[KVCacheBlock]:
        """Put `row` in the place of as many blocks from index `first` on; returns those that were there, which are the
        caller's to free. vLLM hashes no block of this request from now on, in any group.
        """
        blocks, place = self.of(request_id), slice(first, first + len(row))
        replaced = blocks[place]
        blocks[place] = row
        for lists in (self, *self.windows):
            lists.stop_naming(request_id)
        return replaced

    def rename_tail(self, request: Request, first: int, name: BlockHash, left: Container[int] = ()) -> None:
        """Name the request's full blocks from index `first` on after the prefix `name`, in all groups, but for those
        whose numbers are in `left`; vLLM goes on from there.
        """
        name_from(request, first, name)
        for lists in (self, *self.windows):
            lists.rename(request, first, left)


def _answer_front_ends() -> None:
    """Let an engine core of this process pass a front end's question to its scheduler: it calls its methods by name.

    Can go when vLLM lets a front end ask the scheduler, as `collective_rpc` asks the workers.
    """
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, ASK_SCHEDULER, _ask_scheduler)


def _ask_scheduler(engine_core: Any, method: str, args: list[Any]) -> Any:
    if method not in QUESTIONS:
        raise ValueError(f"{method} is no question to the scheduler, there are {', '.join(QUESTIONS)}")
    return getattr(engine_core.scheduler, method)(*args)


class SchedulerHooks(Scheduler):
    """Gives the scheduler mixin public names for hooks that vLLM's scheduler does not offer. It overrides the private
    methods that are declared in `patches`, which says when each can go.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_held_up = False  # a waiting request found no room in this step, and those behind it wait, too
        self.block_lists = BlockLists(self.kv_cache_manager)
        _answer_front_ends()

        def if_admitted(allocate_slots: Callable[..., KVCacheBlocks | None]) -> Callable[..., KVCacheBlocks | None]:
            def wrapped(request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
                if not self.admits(request, kwargs.get("new_computed_blocks")):
                    return None  # what vLLM knows as: no room yet
                if self.fits_as_it_is_computed(request):
                    kwargs["full_sequence_must_fit"] = False
                blocks = allocate_slots(request, *args, **kwargs)
                while blocks is None and self.makes_room(request):
                    blocks = allocate_slots(request, *args, **kwargs)
                if blocks is not None:
                    self.got_blocks(request)
                return blocks

            return wrapped

        apply(ALLOCATE_SLOTS, if_admitted, instance=self.kv_cache_manager)

    def end_with_error(self, request: Request) -> None:
        """End a request with an error after this step.

        Can go when vLLM's scheduler has a public way to.
        """
        errors: Any = self.grammar_compile_error_reqs
        if isinstance(errors, set):  # vLLM 0.32, whose clients learn no cause
            errors.add(request.request_id)
        else:  # vLLM 0.33
            errors[request.request_id] = RequestError(code="kv_compression", message=NO_ROOM)

    def admits(self, request: Request, hit: KVCacheBlocks | None) -> bool:
        """Whether a request may get blocks now; `hit` are those that one not yet running found in the prefix cache."""
        raise NotImplementedError

    def makes_room(self, request: Request) -> bool:
        """Give up blocks for a request that finds none; returns whether some were."""
        raise NotImplementedError

    def is_awaited(self, request: Request) -> bool:
        """Whether a waiting request is passed over in this step."""
        raise NotImplementedError

    def fits_as_it_is_computed(self, request: Request) -> bool:
        """Whether a request may be begun without room for all of its known tokens."""
        raise NotImplementedError

    def got_blocks(self, request: Request) -> None:
        """The request has got blocks for its next tokens."""
        raise NotImplementedError

    def find_prefix(self, request: Request) -> tuple[KVCacheBlocks, int] | None:
        """Blocks to begin with in the place of what vLLM would find, and the tokens that they stand for."""
        raise NotImplementedError

    def limit_prefix_hit(self, request: Request, blocks: KVCacheBlocks, num_tokens: int) -> tuple[KVCacheBlocks, int]:
        """The part of a local prefix-cache hit to use."""
        raise NotImplementedError

    def limit_chunk(self, request: Request, first: int, num_tokens: int) -> int:
        """Tokens to compute now, of `num_tokens` from position `first` on."""
        raise NotImplementedError

    def tell(self, request: Request) -> dict[str, Any] | None:
        """What the answer of a request that has ended says of it, in its field `kv_transfer_params`."""
        raise NotImplementedError

    def forget(self, request: Request) -> None:
        """The request's blocks are about to go back to the pool."""
        raise NotImplementedError

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        # What vLLM 0.33 passes besides is the longest hit of which auxiliary outputs are known: none, they are refused.
        if (found := self.find_prefix(request)) is not None:
            return *found, 0, False
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        blocks, num_tokens = self.limit_prefix_hit(request, blocks, num_tokens)
        return blocks, num_tokens, boundary, diverged

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """See vLLM's."""
        self._is_held_up = False
        return super().schedule(*args, **kwargs)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        ready = super()._handle_blocked_waiting_request(request)
        return ready and not self._is_held_up and not self.is_awaited(request)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        limited = self.limit_chunk(request, num_computed_tokens, num_new_tokens)
        # vLLM 0.32 begins no request behind one that has to wait for room. 0.33 goes on with the next one, and a long
        # prompt would wait for as long as shorter ones come. Can go when vLLM lets a scheduler say which it is.
        if limited == 0 < num_new_tokens and request.status != RequestStatus.RUNNING:
            self._is_held_up = True
        return limited

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.forget(request)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.forget(request)
        transfer, encoder = super()._free_request(request, *args, **kwargs)
        # What a KV connector would tell the client; there is none (refused).
        return self.tell(request) if transfer is None else transfer, encoder
