"""Memory: what a store takes, and what a GPU worker keeps free."""

from __future__ import annotations

from typing import NamedTuple

from .markdown import table


class Shape(NamedTuple):
    """What a model's KV cache depends on, from its config.json."""

    model: str
    layers: int
    heads: int  # KV heads
    head_size: int


SHAPES = (Shape("SmolLM2-135M", 30, 3, 64), Shape("Qwen2.5-1.5B", 28, 2, 128), Shape("Llama-3.1-8B", 32, 8, 128))


def store_sizes(keep_ratio: float = 0.3) -> str:
    """What a store takes for some models, in 16 bits."""
    body = []
    for shape in SHAPES:
        exact = shape.layers * shape.heads * shape.head_size * 2 * 2
        packed = keep_ratio * exact
        body.append([shape.model, f"{shape.layers} × {shape.heads} × {shape.head_size}", f"{exact / 1000:.1f} kB",
                     f"{packed / 1000:.1f} kB", f"{packed * 10_000 / 1e6:.0f} MB",
                     f"{100 * 2**30 / packed / 1e6:.1f} million tokens"])  # fmt: skip
    header = ["", "layers × KV heads × head size", "a token, exact", "a token, stored", "a document of 10,000 tokens",
              "100 GiB hold"]  # fmt: skip
    return table(header, body)


def working_memory() -> str:
    """What a GPU worker keeps free for compression, by the estimate that it makes at its start."""
    from kvsculpt_vllm.config import CompressionConfig
    from kvsculpt_vllm.engine.shared.rank_shape import RankShape
    from kvsculpt_vllm.engine.worker.working_memory import reserved

    lengths = (8_192, 32_768, 131_072)
    ranks = {
        "Llama-3.2-1B": RankShape(16, 8, 32, 64, 2),
        "Qwen2.5-1.5B": RankShape(28, 2, 12, 128, 2),
        "Llama-3.1-8B": RankShape(32, 8, 32, 128, 2),
        "Llama-3.1-70B, each of 8 GPUs": RankShape(80, 1, 8, 128, 2),
    }
    body = []
    for name, rank in ranks.items():
        config = CompressionConfig().for_model(rank.query_numbers)
        parts = [reserved(rank, config, length) for length in lengths]
        heads = f"{rank.num_layers} × {rank.num_query_heads} × {rank.num_kv_heads} × {rank.head_size}"
        body.append([name, heads, _gibibytes(parts[0].samples), *(_gibibytes(part.total) for part in parts)])
    header = ["", "layers × query heads × KV heads × head size", "of which queries"]
    return table(header + [f"`--max-model-len {length}`" for length in lengths], body)


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


TABLES = {"store-sizes": store_sizes, "working-memory": working_memory}
