"""What one worker knows about compression: the cache's geometry, the directory, and each request's sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.compat.worker import row_request_ids
from kvsculpt_vllm.engine.shared import spans
from kvsculpt_vllm.engine.shared.commands import SampleCommand
from kvsculpt_vllm.engine.worker.cache_form import CacheForm
from kvsculpt_vllm.engine.worker.capture import CaptureRows, Piece, QuerySample
from kvsculpt_vllm.engine.worker.directory import Directory
from kvsculpt_vllm.engine.worker.pages import PageFormat, PageGeometry
from kvsculpt_vllm.kernels.pages import FP8
from kvsculpt_vllm.sculpt.storage import Storage

if TYPE_CHECKING:
    from kvsculpt_vllm.engine.shared.record import CompressionRecord


@dataclass(frozen=True)
class BoundLayer:
    """An attention layer's place in the KV cache. Until there is a cache, a layer has none."""

    state: CompressionState
    index: int  # among the layers of this rank


class CompressionState:
    """Shared by the worker, the metadata builder and every attention layer of one rank."""

    def __init__(
        self,
        config: CompressionConfig,
        runner: Any,
        page_format: PageFormat,
        layer_views: list[Tensor],  # per layer: (blocks, heads, block_size, 2D)
        num_query_heads: int,
        max_num_seqs: int,
        dtype: torch.dtype,  # of the model, and so of its queries
    ) -> None:
        self.config, self.runner, self.dtype = config, runner, dtype
        self.geometry, buffer = PageGeometry.of(layer_views)
        self.pages = page_format(buffer, self.geometry)
        self.num_query_heads = num_query_heads
        self.cache_form = CacheForm(self.pages.head_size, dtype, buffer.device) if buffer.dtype == FP8 else None
        self.block_bytes = self.geometry.num_cells * buffer[0].nbytes
        num_blocks = layer_views[0].shape[0]
        self.directory = Directory(
            num_blocks,
            # A segment has a block at least, and requests may hold some that nobody else finds.
            min(num_blocks, max_num_seqs * spans.MOST_OWN_SEGMENTS + spans.MOST_SEGMENTS + 1),
            self.geometry.num_layers,
            self.geometry.num_heads,
            buffer.device,
        )
        self.samples: dict[str, QuerySample] = {}
        self.solved: dict[str, CompressionRecord] = {}  # written and not yet read
        self._configs: dict[str, CompressionConfig] = {}
        self._expected: dict[str, Piece] = {}  # the queries that this step is to keep
        self._computed: dict[str, int] = {}  # tokens of each request of this step that were computed before it

    @property
    def storage(self) -> Storage:
        """What the cache makes of the entries of all heads."""
        if self.cache_form is None:
            return Storage(self.dtype)
        form = self.cache_form.of(self.geometry.num_cells)
        return Storage(self.dtype, (form, form))

    def begin_step(self, output: SchedulerOutput) -> None:
        """Follow requests coming, going, losing their blocks and coming back, before the step's forward pass."""
        for request_id in output.finished_req_ids:
            self._lose(request_id)
            self._configs.pop(request_id, None)
        for request_id in output.preempted_req_ids or ():
            self._lose(request_id)
        cached = output.scheduled_cached_reqs
        # From the scheduler and not from the batch's tensors: reading those would wait for the device.
        self._computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self._computed |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for new in output.scheduled_new_reqs:
            if new.sampling_params is not None:
                self._configs[new.req_id] = self.config.for_request(new.sampling_params.extra_args)

    def sample(self, command: SampleCommand) -> None:
        """Keep some of the queries that this step computes."""
        if command.request_id not in self.samples:
            layers, head_size = self.geometry.num_layers, self.pages.head_size
            like = torch.empty(0, dtype=self.dtype, device=self.pages.buffer.device)
            self.samples[command.request_id] = QuerySample(layers, self.num_query_heads, head_size, like)
        if (piece := self.samples[command.request_id].expect(command.first, command.end)) is not None:
            self._expected[command.request_id] = piece

    def end_step(self) -> None:
        """What is computed until the next step begins serves no request."""
        self._computed, self._expected = {}, {}

    def config_of(self, request_id: str) -> CompressionConfig:
        """The request's settings."""
        return self._configs[request_id]

    def capture_rows(self, metadata: CommonAttentionMetadata) -> list[CaptureRows]:
        """Which rows of this step's queries to copy into samples."""
        if not self._expected:
            return []
        captures = []
        starts = metadata.query_start_loc_cpu.tolist()
        for row, request_id in enumerate(row_request_ids(self.runner, metadata)):
            # A dummy batch, which keeps other ranks company, names requests that are not in this step.
            if (piece := self._expected.get(request_id)) is None or request_id not in self._computed:
                continue
            if (sample := self.samples.get(request_id)) is None:  # a compression of it has failed in this very step
                continue
            first = starts[row] + piece.first - self._computed[request_id]
            source = slice(first, first + piece.end - piece.first)
            if source.stop <= starts[row + 1]:
                captures.append(CaptureRows(sample, piece, source))
        return captures

    def packed_until(self, request_id: str, position: int) -> None:
        """The tokens before a position are packed: nothing more will be made of their queries."""
        if (sample := self.samples.get(request_id)) is not None:
            sample.drop(position)

    def unsolve(self, request_id: str) -> None:
        """Forget what was solved for a request and not read yet; its sample stays."""
        self.directory.release(request_id)
        self.solved.pop(request_id, None)

    def _lose(self, request_id: str) -> None:
        self.unsolve(request_id)
        self.samples.pop(request_id, None)
