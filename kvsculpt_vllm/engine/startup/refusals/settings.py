"""Settings of vLLM that compression does not go together with, whatever the model is."""

from __future__ import annotations

import vllm.envs as envs

from kvsculpt_vllm.engine.startup.refusals.refusal import Refusal, Rule

FEATURES = (
    Rule(
        lambda c: c.speculative_config is not None,
        Refusal(
            "speculative decoding",
            "drafted tokens are verified against the whole cache",
            "remove --speculative-config and the --spec-* flags",
        ),
    ),
    Rule(
        lambda c: c.kv_transfer_config is not None or c.cache_config.kv_offloading_size is not None,
        Refusal(
            "KV connectors and KV offloading",
            "they move blocks whose contents compression replaces",
            "remove --kv-transfer-config and --kv-offloading-size",
        ),
    ),
    Rule(
        lambda c: c.kv_events_config is not None and c.kv_events_config.enable_kv_cache_events,
        Refusal(
            "KV cache events",
            "a block that is packed, or computed from packed ones, has no name that others know",
            "remove --kv-events-config",
        ),
    ),
    Rule(
        lambda c: c.aux_output_config.enabled,
        Refusal(
            "routed experts in answers",
            "they are kept by the names of blocks, and what a segment stands for has other names or none",
            "remove --enable-return-routed-experts and --aux-output-config",
        ),
    ),
    Rule(
        lambda c: c.attention_config.hisparse_config is not None,
        Refusal("HiSparse", "it keeps the KV cache on the host", "remove hisparse_config from --attention-config"),
    ),
    Rule(
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
        Refusal(
            "decode context parallelism",
            "it spreads one request's tokens over several caches",
            "remove --decode-context-parallel-size",
        ),
    ),
    Rule(
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
        Refusal(
            "prefill context parallelism",
            "it spreads one request's tokens over several caches",
            "remove --prefill-context-parallel-size",
        ),
    ),
    Rule(
        lambda c: c.parallel_config.use_ubatching,
        Refusal(
            "dual batch overlap and micro-batches",
            "attention sees half a batch at a time",
            "remove --enable-dbo and --ubatch-size",
        ),
    ),
)

FRONTEND = (
    Rule(
        lambda c: envs.VLLM_USE_RUST_FRONTEND,
        Refusal(
            "the Rust frontend",
            "it does not run Python plugins, so requests would go unchecked",
            "unset VLLM_USE_RUST_FRONTEND",
        ),
    ),
)
