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
        self._counted: dict[str, tuple[Request, int]] = {}  # how many of a request's blocks are in `_holders`

    def count(self, running: Iterable[tuple[Request, int]]) -> int:
        """Blocks that stock vLLM would hold for requests whose block lists have so many entries."""
        alone = 0
        for request, num_blocks in running:
            _, before = self._counted.get(request.request_id, (request, 0))
            full = min(len(request.block_hashes), request.num_computed_tokens // self._block_size, num_blocks)
            if full > before:
                self._holders.update(request.block_hashes[before:full])
                self._counted[request.request_id] = request, full
            alone += num_blocks - max(full, before)
        return len(self._holders) + alone

    def forget(self, request_id: str) -> None:
        """The request holds nothing any more; an unknown one is fine."""
        request, count = self._counted.pop(request_id, (None, 0))
        for block_hash in request.block_hashes[:count] if request is not None else ():
            self._holders[block_hash] -= 1
            if not self._holders[block_hash]:
                del self._holders[block_hash]
