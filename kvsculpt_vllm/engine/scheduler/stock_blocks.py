"""How many blocks stock vLLM would hold for the same requests, to tell what compression saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request


class StockBlocks:
    """Stock vLLM holds a block once, however many requests share it: full blocks of equal hash are one block.

    Each request's full blocks are counted once, when they have been computed, so that a step costs no more than the
    blocks that it fills.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._holders: Counter[BlockHash] = Counter()
        self._counted: dict[str, int] = {}  # how many of a request's blocks are in `_holders`
        self._names: dict[str, list[BlockHash]] = {}  # of requests whose blocks are called otherwise now

    def count(self, running: Iterable[tuple[Request, int]]) -> int:
        """Blocks that stock vLLM would hold for requests whose block lists have so many entries."""
        alone = 0
        for request, num_blocks in running:
            request_id = request.request_id
            before, names = self._counted.get(request_id, 0), self._names.get(request_id, request.block_hashes)
            full = min(len(names), request.num_computed_tokens // self._block_size, num_blocks)
            if full > before:
                self._holders.update(names[before:full])
                self._counted[request_id] = full
            alone += num_blocks - max(full, before)
        return len(self._holders) + alone

    def keep_names(self, request: Request) -> None:
        """The request's blocks are about to be called otherwise: stock vLLM would go on calling them as now."""
        self._names.setdefault(request.request_id, list(request.block_hashes))

    def forget(self, request: Request) -> None:
        """The request holds nothing any more; an unknown one is fine."""
        names = self._names.pop(request.request_id, request.block_hashes)
        for block_hash in names[: self._counted.pop(request.request_id, 0)]:
            self._holders[block_hash] -= 1
            if not self._holders[block_hash]:
                del self._holders[block_hash]
