"""The state machine over the embedded model's configuration."""

import pytest
from hypothesis.internal.conjecture import providers
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

from scheduler_machine import MAX_TOKENS, Machine
from worker_double import BLOCK


@pytest.fixture(autouse=True)
def the_same_examples_whatever_is_loaded(monkeypatch):
    """Hypothesis also draws the constants of all modules of ours that are loaded: what happens at random would depend
    on which other tests run before.
    """
    nothing = providers.Constants()
    monkeypatch.setattr(providers, "_get_local_constants", lambda: nothing)


@pytest.fixture(scope="module")
def machine(model_path):
    """The state machine, over the embedded model's configuration (its weights are not loaded)."""
    return bound(model_path, MAX_TOKENS)


@pytest.fixture(scope="module")
def windowed_machine(model_path):
    """The same, as if other layers of that model saw a window."""
    windowed = bound(model_path, 800, width=100)
    text = windowed.config.model_config.hf_text_config
    text.sliding_window, text.layer_types = windowed.width, ["sliding_attention", "full_attention"]
    return windowed


def bound(model_path, longest, width=0):
    """A machine for requests of up to so many tokens."""
    vllm_config = EngineArgs(
        model=str(model_path),
        block_size=BLOCK,
        max_model_len=longest,
        max_num_seqs=4,
        max_num_batched_tokens=160,
        kv_cache_memory_bytes=1 << 26,
        enforce_eager=True,
    ).create_engine_config()
    hash_fn = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
    init_none_hash(hash_fn)

    class Bound(Machine):
        config, hasher = vllm_config, staticmethod(get_request_block_hasher(BLOCK, hash_fn))

    Bound.width = width

    return Bound
