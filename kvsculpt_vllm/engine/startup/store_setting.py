"""The store that the settings name, tried when the engine is configured: a wrong one is told then, not by no hits."""

from __future__ import annotations

from vllm.config import VllmConfig

from kvsculpt_vllm.config import CompressionConfig, ConfigError, WrongSetting, allowed, flag
from kvsculpt_vllm.engine.shared.stores import NO_STORE, store_of
from kvsculpt_vllm.store.places import shown


def check_store(config: CompressionConfig, vllm_config: VllmConfig) -> None:
    """Check that there is such a store, and that what it needs of vLLM is on.

    Raises:
        ConfigError: says what is wrong, and what to do.
    """
    if config.store == NO_STORE:
        return
    if not vllm_config.cache_config.enable_prefix_caching:
        cure = "none together with --no-enable-prefix-caching, as nothing is found again"
        raise ConfigError([WrongSetting(flag("store"), shown(config.store), cure)])
    try:
        store = store_of(config)
        assert store is not None
        store.check()
    except ValueError as error:
        raise ConfigError([WrongSetting(flag("store"), shown(config.store), f"{allowed('store')} ({error})")]) from None
