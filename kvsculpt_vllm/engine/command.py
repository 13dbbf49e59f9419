"""What the scheduler tells the workers to compress, attached to vLLM's scheduler output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ATTRIBUTE = "kv_compression_commands"


@dataclass(frozen=True)
class CompressCommand:
    """Compress one request before the next forward pass. Block ids are those of vLLM's pool."""

    request_id: str
    num_prompt_tokens: int
    span_tokens: int
    prompt_blocks: list[int]  # the blocks that hold the prompt now: the span's, then the tail's
    row: list[int]  # the request's new block list: packed, then null (0) up to the span's length, then the tail
    packed_blocks: int
    blocks_freed: int  # by how much the pool's free count rose
    steps_waited: int  # scheduler steps in which the pool had too few free blocks for the packed prefix

    @property
    def first_block(self) -> int:
        """The block that the directory knows this packed prefix by."""
        return self.row[0]


def attach(scheduler_output: Any, commands: list[CompressCommand]) -> None:
    """Send `commands` along with a scheduler output; a plain attribute survives pickling to every rank."""
    setattr(scheduler_output, _ATTRIBUTE, commands)


def attached(scheduler_output: Any) -> list[CompressCommand]:
    """The commands that came along with a scheduler output."""
    return getattr(scheduler_output, _ATTRIBUTE, [])
