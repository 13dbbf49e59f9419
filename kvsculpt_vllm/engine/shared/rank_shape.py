"""The attention of one rank: what its memory for compression follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvsculpt_vllm.engine.shared.cache_dtype import is_fp8
from kvsculpt_vllm.engine.shared.groups import compressed_layers, has_windows


@dataclass(frozen=True)
class RankShape:
    """The numbers of one rank's attention, as far as it is compressed."""

    num_layers: int
    num_kv_heads: int
    num_query_heads: int
    head_size: int
    element_bytes: int  # of a query
    in_fp8: bool = False  # what the cache holds

    @classmethod
    def of(cls, vllm_config: Any) -> RankShape:
        """The shape of the rank whose configuration this is; the first one's in the scheduler."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        assert isinstance(model.dtype, torch.dtype)  # and no name any more: vLLM has resolved it
        return cls(
            # Windows go with full attention on one pipeline stage only (refused).
            num_layers=len(compressed_layers(model)) if has_windows(vllm_config) else model.get_num_layers(parallel),
            num_kv_heads=model.get_num_kv_heads(parallel),
            num_query_heads=model.get_num_attention_heads(parallel),
            head_size=model.get_head_size(),
            element_bytes=model.dtype.itemsize,
            in_fp8=is_fp8(vllm_config),
        )

    @property
    def entry_bytes(self) -> int:
        """Bytes of an element of an entry that a solve has read: FP8 is read as float32."""
        return 4 if self.in_fp8 else self.element_bytes

    @property
    def query_numbers(self) -> int:
        """Numbers that the queries of one position are."""
        return self.num_layers * self.num_query_heads * self.head_size

    @property
    def position_bytes(self) -> int:
        """Bytes that they take, in the model's dtype."""
        return self.query_numbers * self.element_bytes
