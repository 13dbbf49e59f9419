"""Tiny models of many architectures, and what becomes of each: compressed exactly, or refused for which reason.

`tests/engine/test_zoo.py` runs every one of them, and `docs/tables/` shows the same table in docs/features.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

CONTEXT, ORIGINAL, WIDTH = 1024, 256, 80
LAYERS, VOCABULARY = 4, 512
"""Enough layers for every pattern of layers here, and few enough tokens for all to come up in a prompt."""

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,  # of size 32, the smallest that vLLM's CPU kernel has
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
GPT_OSS_YARN = YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}


def longrope(angles: int) -> dict[str, Any]:
    """Other frequencies in a short context than in a long one; `angles` of them turn a query."""
    return {
        "original_max_position_embeddings": ORIGINAL,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0 + 0.1 * i for i in range(angles)],
            "long_factor": [2.0 + i for i in range(angles)],
            "original_max_position_embeddings": ORIGINAL,
        },
    }


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
GPT = {"n_embd": 128, "n_head": 4, "n_layer": LAYERS, "n_inner": 256, "n_positions": CONTEXT, "n_ctx": CONTEXT}


def every(other: str, nth: int) -> dict[str, list[str]]:
    """Layers of which every nth has full attention."""
    return {"layer_types": ["full_attention" if (i + 1) % nth == 0 else other for i in range(LAYERS)]}


class Model(NamedTuple):
    """One architecture as vLLM knows it, with what is particular about its attention."""

    name: str
    particular: str
    architecture: str
    model_type: str
    changes: dict[str, Any]
    """What its config.json has besides `SIZES`, or in place of it; None leaves a size out."""
    refused: str = ""
    """The feature that it is refused for; empty if it is exact."""
    engine: dict[str, Any] = {}  # noqa: RUF012 - never written to
    """Arguments of vLLM's."""

    def write(self, folder: Path) -> Path:
        """Its directory, with a config.json and no weights."""
        given = {"architectures": [self.architecture], "model_type": self.model_type, **SIZES, **self.changes}
        kept = {key: value for key, value in given.items() if value is not None}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        return folder


MLA, WINDOW, MAMBA = "MLA models", "sliding-window models", "hybrid, Mamba and linear-attention models"
POSITIONS = "positions"  # the feature goes on with a layer's name
ALIBI, SHARED = "ALiBi models", "models whose layers share a KV cache"

ZOO = (
    Model("Llama", "grouped queries", "LlamaForCausalLM", "llama", {}),
    Model("Llama", "one KV head for each query head", "LlamaForCausalLM", "llama", {"num_key_value_heads": 4}),
    Model("Llama", "8 query heads for one KV head", "LlamaForCausalLM", "llama",
          {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32}),
    Model("Llama 3.1", "rescaled frequencies", "LlamaForCausalLM", "llama", {"rope_parameters": LLAMA3}),
    Model("Llama 3.2", "tied embeddings", "LlamaForCausalLM", "llama", {"tie_word_embeddings": True}),
    Model("Llama", "YaRN", "LlamaForCausalLM", "llama", {"rope_parameters": YARN}),
    Model("Llama", "biases everywhere", "LlamaForCausalLM", "llama", {"attention_bias": True, "mlp_bias": True}),
    Model("Llama", "run by transformers' code (`--model-impl transformers`)", "LlamaForCausalLM", "llama", {},
          engine={"model_impl": "transformers"}),
    Model("Mistral", "no window; heads larger than hidden size / heads, as in Nemo", "MistralForCausalLM", "mistral",
          {"sliding_window": None, "head_dim": 64}),
    Model("Mixtral", "experts", "MixtralForCausalLM", "mixtral", EXPERTS | {"sliding_window": None}),
    Model("Qwen2", "biases of queries, keys and values", "Qwen2ForCausalLM", "qwen2", {}),
    Model("Qwen3", "norms of queries and keys", "Qwen3ForCausalLM", "qwen3", {"head_dim": 64}),
    Model("Qwen3-MoE", "experts", "Qwen3MoeForCausalLM", "qwen3_moe", EXPERTS | {"head_dim": 32}),
    Model("OLMo 2", "norms of all heads together", "Olmo2ForCausalLM", "olmo2", {}),
    Model("OLMoE", "experts, norms of all heads together", "OlmoeForCausalLM", "olmoe", EXPERTS),
    Model("Phi-2", "a part of each head is turned", "PhiForCausalLM", "phi", {"partial_rotary_factor": 0.5}),
    Model("Phi-3", "queries, keys and values in one matrix", "Phi3ForCausalLM", "phi3", {"sliding_window": None}),
    Model("Phi-4-mini", "LongRoPE, a part of each head, a window as wide as the context", "Phi3ForCausalLM", "phi3",
          longrope(12) | {"sliding_window": 2 * CONTEXT, "partial_rotary_factor": 0.75}),
    Model("Gemma", "one KV head, scaled embeddings", "GemmaForCausalLM", "gemma",
          {"num_key_value_heads": 1, "head_dim": 64}),
    Model("SmolLM3", "every fourth layer has no positions", "SmolLM3ForCausalLM", "smollm3",
          {"no_rope_layers": [1, 1, 1, 0]}),
    Model("GLM-4", "neighbours turned, a part of each head", "Glm4ForCausalLM", "glm4",
          {"head_dim": 32, "partial_rotary_factor": 0.5, "attention_bias": True}),
    Model("StarCoder2", "biases everywhere", "Starcoder2ForCausalLM", "starcoder2",
          {"use_bias": True, "sliding_window": None}),
    Model("Granite", "a scale of attention of its own", "GraniteForCausalLM", "granite",
          {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    Model("GPT-NeoX", "a quarter of each head is turned, parallel residuals", "GPTNeoXForCausalLM", "gpt_neox",
          {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": None, "rotary_pct": 0.25}),
    Model("Falcon", "one KV head, parallel residuals", "FalconForCausalLM", "falcon",
          {"alibi": False, "multi_query": True, "new_decoder_architecture": False}),
    Model("MiniCPM", "scaled residuals", "MiniCPMForCausalLM", "llama",
          {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 64, "num_experts": 0}),
    Model("Command R", "neighbours turned, parallel residuals", "CohereForCausalLM", "cohere", {"logit_scale": 0.25}),
    Model("Nemotron", "half of each head is turned", "NemotronForCausalLM", "nemotron",
          {"partial_rotary_factor": 0.5, "head_dim": 32}),
    Model("StableLM", "a quarter of each head is turned", "StableLmForCausalLM", "stablelm", {}),
    Model("GPT-J", "neighbours turned, a part of each head", "GPTJForCausalLM", "gptj", GPT | {"rotary_dim": 16}),
    Model("GPT-2", "learned positions", "GPT2LMHeadModel", "gpt2", GPT),
    Model("OPT", "learned positions, with an offset", "OPTForCausalLM", "opt",
          {"ffn_dim": 128, "word_embed_proj_dim": 128}),
    Model("Seed-OSS", "heads larger than hidden size / heads", "SeedOssForCausalLM", "seed_oss", {"head_dim": 64}),
    Model("StarCoder", "learned positions, one KV head", "GPTBigCodeForCausalLM", "gpt_bigcode",
          GPT | {"num_key_value_heads": None}),
    Model("Llama", "dynamic NTK", "LlamaForCausalLM", "llama",
          {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    Model("OLMo 3", "a context within its window", "Olmo3ForCausalLM", "olmo3", {"sliding_window": CONTEXT}),
    Model("Gemma 3", "a context within its window", "Gemma3ForCausalLM", "gemma3_text",
          {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": CONTEXT,
           **every("sliding_attention", 4)}),
    Model("Gemma 2", "a soft cap, a context within its window", "Gemma2ForCausalLM", "gemma2",
          # So low because its logits are small: under the real model's 50 the cap would change nothing.
          {"head_dim": 64, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 4.0, "sliding_window": CONTEXT}),
    Model("gpt-oss", "learned sinks, YaRN, experts, a context within its window", "GptOssForCausalLM", "gpt_oss",
          EXPERTS | {"head_dim": 32, "sliding_window": CONTEXT, "rope_parameters": GPT_OSS_YARN}),
    Model("Gemma 3", "a window in three of four layers", "Gemma3ForCausalLM", "gemma3_text",
          {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WIDTH, **every("sliding_attention", 4)}),
    Model("OLMo 3", "a window in three of four layers", "Olmo3ForCausalLM", "olmo3", {"sliding_window": WIDTH}),
    Model("Command R7B", "a window in three of four layers, positions in those alone", "Cohere2ForCausalLM", "cohere2",
          {"sliding_window": WIDTH}),
    Model("EXAONE 4", "a window in half of the layers, positions in those alone", "Exaone4ForCausalLM", "exaone4",
          {"sliding_window": WIDTH, **every("sliding_attention", 2)}),
    Model("Gemma 2", "a window in every other layer, a soft cap", "Gemma2ForCausalLM", "gemma2",
          {"head_dim": 64, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 3.0, "sliding_window": 300}),
    Model("gpt-oss", "a window in every other layer, learned sinks, YaRN, experts", "GptOssForCausalLM", "gpt_oss",
          EXPERTS | {"head_dim": 32, "sliding_window": WIDTH, "rope_parameters": GPT_OSS_YARN}),
    Model("Mistral", "a window in every layer", "MistralForCausalLM", "mistral", {"sliding_window": 256}, WINDOW),
    Model("Gemma 3n", "shared caches", "Gemma3nForCausalLM", "gemma3n_text", {"num_kv_shared_layers": 2}, SHARED),
    Model("Llama 4, text", "chunks in three of four layers", "Llama4ForCausalLM", "llama4_text",
          EXPERTS | {"head_dim": 32, "attention_chunk_size": 256}, "models with chunked local attention"),
    Model("BLOOM", "ALiBi", "BloomForCausalLM", "bloom", {"n_head": 4, "n_layer": LAYERS}, ALIBI),
    Model("Falcon-RW", "ALiBi", "FalconForCausalLM", "falcon", {"alibi": True}, ALIBI),
    Model("DeepSeek-V2", "latent attention", "DeepseekV2ForCausalLM", "deepseek_v2",
          LATENT | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}, MLA),
    Model("MiniCPM3", "the end of each head is turned", "MiniCPM3ForCausalLM", "minicpm3", LATENT, POSITIONS),
    Model("Ministral 3", "queries grow with their position", "Ministral3ForCausalLM", "ministral3",
          {"head_dim": 32, "llama_4_scaling": {"original_max_position_embeddings": ORIGINAL, "beta": 0.1}},
          POSITIONS),
    Model("HunYuan", "norms after the rotation", "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense",
          {"head_dim": 32}, POSITIONS),
    Model("Phi-3", "LongRoPE that changes while a request grows (`--model-impl transformers`)", "Phi3ForCausalLM",
          "phi3", longrope(16) | {"sliding_window": None}, POSITIONS, {"model_impl": "transformers"}),
    Model("Mamba", "no attention", "MambaForCausalLM", "mamba", {"state_size": 16}, MAMBA),
    Model("Qwen3-Next", "linear attention in three of four layers", "Qwen3NextForCausalLM", "qwen3_next",
          EXPERTS | {"head_dim": 32}, MAMBA),
    Model("Jamba", "Mamba in most layers", "JambaForCausalLM", "jamba", EXPERTS, MAMBA),
    Model("LFM2", "convolutions in most layers", "Lfm2ForCausalLM", "lfm2", {}, MAMBA),
)  # fmt: skip
"""Every model; those with one verdict stand together."""
