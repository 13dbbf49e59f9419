"""What one worker knows about compression: the cache's geometry, the directory, and each request's sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.compat.worker import row_request_ids
from kvsculpt_vllm.engine.shared import spans
from kvsculpt_vllm.engine.shared.reasons import Reason
from kvsculpt_vllm.engine.worker.capture import CaptureRows, QuerySample
from kvsculpt_vllm.engine.worker.directory import Directory
from kvsculpt_vllm.engine.worker.pages import PageFormat, PageGeometry
from kvsculpt_vllm.sculpt.effort import EFFORTS
from kvsculpt_vllm.sculpt.queries import sample_positions

if TYPE_CHECKING:
    from kvsculpt_vllm.engine.shared.record import CompressionRecord


SAMPLES_BYTES = 4 << 30
"""What the queries of all prompts that are computed or wait for their compression may take. One more stays exact."""


@dataclass(frozen=True)
class TrackedRequest:
    """A request whose prompt is to be compressed."""

    config: CompressionConfig
    num_prompt_tokens: int
    max_tokens: int | None


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
    ) -> None:
        self.config, self.runner = config, runner
        self.geometry, buffer = PageGeometry.of(layer_views)
        self.pages = page_format(buffer, self.geometry)
        self.num_query_heads = num_query_heads
        self.block_bytes = self.geometry.num_cells * buffer[0].nbytes
        num_blocks = layer_views[0].shape[0]
        self.directory = Directory(
            num_blocks,
            max_num_seqs + spans.MOST_SEGMENTS + 1,
            self.geometry.num_layers,
            self.geometry.num_heads,
            buffer.device,
        )
        self.samples: dict[str, QuerySample] = {}
        self.solved: dict[str, CompressionRecord] = {}  # written and not yet read
        self._tracked: dict[str, TrackedRequest] = {}
        self._computed: dict[str, int] = {}  # tokens of each request of this step that were computed before it

    def begin_step(self, output: SchedulerOutput) -> None:
        """Follow requests coming, going, losing their blocks and coming back, before the step's forward pass."""
        for request_id in output.finished_req_ids:
            self._lose(request_id)
            self._tracked.pop(request_id, None)
        for request_id in output.preempted_req_ids or ():
            self._lose(request_id)
        cached = output.scheduled_cached_reqs
        # From the scheduler and not from the batch's tensors: reading those would wait for the device.
        self._computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self._computed |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for new in output.scheduled_new_reqs:
            if new.sampling_params is None:
                continue
            num_prompt = length_from_prompt_token_ids_or_embeds(new.prompt_token_ids, new.prompt_embeds)
            config = self.config.for_request(new.sampling_params.extra_args)
            self._track(
                new.req_id,
                TrackedRequest(config, num_prompt, new.sampling_params.max_tokens),
                new.num_computed_tokens,
                new.block_ids[0][0],
            )
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids and request_id in self._tracked and blocks is not None:
                self._track(request_id, self._tracked[request_id], self._computed[request_id], blocks[0][0])

    def end_step(self) -> None:
        """What is computed until the next step begins serves no request."""
        self._computed = {}

    def tracked(self, request_id: str) -> TrackedRequest:
        """The request's settings and prompt length."""
        return self._tracked[request_id]

    def falls_back_to_selection(self, request_id: str) -> bool:
        """Whether the request wants selection where its compression fails."""
        known = self._tracked.get(request_id)
        return known is not None and known.config.on_failure == "select"

    def capture_rows(self, metadata: CommonAttentionMetadata) -> list[CaptureRows]:
        """Which rows of this step's queries to copy into samples."""
        if not self.samples:
            return []
        captures = []
        starts = metadata.query_start_loc_cpu.tolist()
        for row, request_id in enumerate(row_request_ids(self.runner, metadata)):
            sample = self.samples.get(request_id)
            # A dummy batch, which keeps other ranks company, names requests that are not in this step.
            if sample is None or sample.complete or request_id not in self._computed:
                continue
            num_tokens = starts[row + 1] - starts[row]
            rows = sample.rows(self._computed[request_id], num_tokens, starts[row])
            if rows is not None:
                captures.append(rows)
        return captures

    def unsolve(self, request_id: str) -> None:
        """Forget what was solved for a request and not read yet; its sample stays."""
        self.directory.release(request_id)
        self.solved.pop(request_id, None)

    def _lose(self, request_id: str) -> None:
        self.unsolve(request_id)
        self.samples.pop(request_id, None)

    def _track(self, request_id: str, request: TrackedRequest, num_computed: int, first_block: int) -> None:
        planned = spans.plan_span(
            request.config, request.num_prompt_tokens, self.geometry.block_size, request.max_tokens
        )
        if isinstance(planned, Reason):
            return
        self._tracked[request_id] = request
        if first_block in self.directory:  # it was found sculpted
            return
        like, shape = self.pages.buffer, (self.geometry.num_layers, self.num_query_heads, self.pages.head_size)
        position_bytes = math.prod(shape) * like.element_size()
        count = EFFORTS[request.config.effort].positions_for(position_bytes)
        first = min(num_computed, request.num_prompt_tokens - 1)
        positions, recent = sample_positions(first, request.num_prompt_tokens, count)
        taken = sum(sample.nbytes for sample in self.samples.values())
        if taken and taken + len(positions) * position_bytes > SAMPLES_BYTES:
            why = f"the queries of {len(self.samples)} other prompts take {taken / 2**30:.1f} GiB of memory already"
            self.samples[request_id] = QuerySample.refusal(why)
        else:
            self.samples[request_id] = QuerySample(positions, recent, *shape, like=like)
