"""The store of a server's segments, as each of its processes opens it."""

from __future__ import annotations

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.store.background import BackgroundStore
from kvsculpt_vllm.store.store import Store

NO_STORE = "none"

PATIENCE_SECONDS = 10.0
"""How long a request waits for the store: what is slower is taken for gone."""


def store_of(config: CompressionConfig) -> Store | None:
    """The store that the settings name, not yet looked at; None if there is none.

    Raises:
        ValueError: no such kind of store is known here.
    """
    if config.store == NO_STORE:
        return None
    return Store(config.store, config.store_size or None, config.store_mode == "readwrite")


def opened(config: CompressionConfig) -> BackgroundStore | None:
    """The store, worked on beside the path of requests."""
    store = store_of(config)
    return None if store is None else BackgroundStore(store, patience_s=PATIENCE_SECONDS)
