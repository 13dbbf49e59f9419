"""The queries of a prompt, kept per request and layer while the prompt is computed in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.logger import init_logger

from kvsculpt_vllm.sculpt.transfer import on_device

logger = init_logger("vllm.kvsculpt")


@dataclass
class Piece:
    """The queries of one chunk."""

    first: int  # position of the first one
    queries: Tensor  # (L, n, heads, D) in the model's dtype
    seen: bool = False

    @property
    def end(self) -> int:
        """The position behind the last one."""
        return self.first + self.queries.shape[1]


@dataclass(frozen=True)
class CaptureRows:
    """Rows of one forward pass to copy into one request's sample."""

    sample: QuerySample
    piece: Piece
    source: slice  # of the batch's tokens

    def store(self, layer: int, query: Tensor) -> None:
        """Copy rows of `query` (T, heads, D) of one layer. What goes wrong ends the sampling, not the forward pass."""
        if self.sample.failure is not None:
            return
        try:
            self.piece.queries[layer] = query[self.source]
        except Exception as error:  # noqa: BLE001 - the prompt stays exact, and the reason is logged
            self.sample.fail(error)
            return
        # Here and not when the step was planned: a step that replays a CUDA graph never comes here.
        if layer == 0:
            self.piece.seen = True


class QuerySample:
    """The kept queries of one request, of consecutive positions."""

    def __init__(self, num_layers: int, num_heads: int, head_size: int, like: Tensor) -> None:
        """`like` has the dtype and the device of the queries."""
        self._shape, self._like = (num_layers, num_heads, head_size), like
        self.failure: str | None = None  # why there will be no sample
        self._pieces: list[Piece] = []

    def expect(self, first: int, end: int) -> Piece | None:
        """Make room for the queries of positions `first` to `end`; None after a failure."""
        if self.failure is not None:
            return None
        layers, heads, head_size = self._shape
        try:
            piece = Piece(first, self._like.new_empty(layers, end - first, heads, head_size))
        except Exception as error:  # noqa: BLE001 - most likely no memory: the prompt stays exact
            self.fail(error)
            return None
        self._pieces.append(piece)
        return piece

    def fail(self, error: Exception) -> None:
        """Give the sample up and its memory back."""
        self.failure = f"sampling queries failed: {type(error).__name__}: {error}"
        self._pieces = []
        logger.warning("kvsculpt: a prompt will stay exact, %s", self.failure, exc_info=error)

    def drop(self, before: int) -> None:
        """Positions before this one are not needed any more."""
        self._pieces = [piece for piece in self._pieces if piece.end > before]
        for piece in self._pieces:
            if piece.first < before:
                # A copy, so that the memory of the others comes free.
                piece.queries, piece.first = piece.queries[:, before - piece.first :].clone(), before

    def covers(self, first: int, end: int) -> bool:
        """Whether the queries of all these positions are there."""
        position = first
        for piece in self._pieces:
            if piece.first <= position < piece.end and piece.seen:
                position = piece.end
        return position >= end

    def at(self, positions: Tensor) -> SampledQueries:
        """The queries of some positions (P,), ascending, on the CPU; all of them are to be there."""
        return SampledQueries(self._pieces, positions)


class SampledQueries:
    """Queries (L, P, heads, D) of which some heads' are put together when they are asked for, so that they are not held
    twice (`sculpt.queries.Asked`).
    """

    def __init__(self, pieces: list[Piece], positions: Tensor) -> None:
        self._parts = []
        for piece in pieces:
            inside = positions[(positions >= piece.first) & (positions < piece.end)]
            if len(inside):
                self._parts.append((piece.queries, on_device(inside - piece.first, piece.queries.device)))
        layers, _, heads, head_size = self._parts[0][0].shape
        self.shape = (layers, len(positions), heads, head_size)

    def __getitem__(self, which: tuple[Tensor, slice, Tensor]) -> Tensor:
        layers, _, heads = which
        parts = [queries[layers.unsqueeze(2), index, heads.unsqueeze(2)] for queries, index in self._parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
