"""Binds compression to vLLM's workers and attention layers, on every device alike; `worker_cpu` and `worker_gpu` put it
over vLLM's workers.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
import vllm
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig

from kvsculpt_vllm import __version__
from kvsculpt_vllm.engine.compat.worker import BlockRows, block_table_columns
from kvsculpt_vllm.engine.shared.cache_dtype import is_fp8
from kvsculpt_vllm.engine.shared.capacity import server_settings
from kvsculpt_vllm.engine.shared.groups import compressed_layers, full_group
from kvsculpt_vllm.engine.shared.ledger import Ledger
from kvsculpt_vllm.engine.shared.stores import PATIENCE_SECONDS, opened
from kvsculpt_vllm.engine.startup.refusals.cache import check_cache_dtype
from kvsculpt_vllm.engine.startup.refusals.layers import check_attention_layers
from kvsculpt_vllm.engine.worker.agreement import Ranks
from kvsculpt_vllm.engine.worker.cache_form import key_centres
from kvsculpt_vllm.engine.worker.compressor import Compressor
from kvsculpt_vllm.engine.worker.model_rotary import rotary_of_layers
from kvsculpt_vllm.engine.worker.pages import PageFormat, TokenPages
from kvsculpt_vllm.engine.worker.rank_curves import curves_of_rank
from kvsculpt_vllm.engine.worker.runtime import Runtime
from kvsculpt_vllm.engine.worker.selftest.run import Report
from kvsculpt_vllm.engine.worker.selftest.start_up import test_at_start_up
from kvsculpt_vllm.engine.worker.selftest.subject import Subject
from kvsculpt_vllm.engine.worker.softmax import have_sinks, sink_logits_of, soft_cap_of
from kvsculpt_vllm.engine.worker.state import BoundLayer, CompressionState
from kvsculpt_vllm.engine.worker.stored import StoredSegments
from kvsculpt_vllm.kernels.pages import FP8

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker
else:
    Worker = object  # of two: the mixin goes over either


@runtime_checkable
class Bindable(Protocol):
    """Our attention of one layer, of either backend."""

    bound: BoundLayer | None


class SculptWorkerMixin(Worker):
    """Compression over one of vLLM's workers, whose class says by which attention backend the cache is read."""

    attention_backend: ClassVar[tuple[AttentionBackendEnum, str]]  # the name that vLLM looks up, and our class
    page_format: ClassVar[PageFormat]  # what that backend's pages hold

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Here and not at import, so that a backend is replaced only where compression is on.
        register_backend(*self.attention_backend)
        super().__init__(*args, **kwargs)
        self.kv_compression: Runtime | None = None  # until there is a KV cache: vLLM runs steps before, to measure
        self.self_tested: Report | None = None  # what reads pages of our kernels is tested once, before it serves

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Bind the layers once the KV cache exists."""
        super().initialize_from_config(kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        self._group = full_group(groups)
        group = groups[self._group]
        by_name = get_layers_from_vllm_config(self.vllm_config, Attention, group.layer_names)
        layers = [by_name[name] for name in group.layer_names]
        check_attention_layers(by_name)
        check_cache_dtype(self.vllm_config)
        views = [layer.kv_cache for layer in layers]
        # vLLM has bytes where the cache holds FP8.
        self._layer_views = [view.view(FP8) for view in views] if is_fp8(self.vllm_config) else views
        dtype = self.model_config.dtype
        assert isinstance(dtype, torch.dtype)  # and no name any more: vLLM has resolved it
        state = CompressionState(
            server_settings(self.vllm_config),
            self.model_runner,
            self.page_format,
            self._layer_views,
            layers[0].num_heads,
            self.scheduler_config.max_num_seqs,
            dtype,
        )
        ranks = Ranks()
        named = dict(zip(group.layer_names, layers, strict=True))
        rotaries = rotary_of_layers(self.model_runner, named)
        curves = curves_of_rank(
            state.config,
            group.layer_names,
            layers[0].num_kv_heads,
            ranks.place[1],
            self.parallel_config.tensor_parallel_size,
            compressed_layers(self.model_config),
        )
        impls = [layer.impl for layer in layers]
        self._softmax = soft_cap_of(impls[0]), have_sinks(impls)
        # A soft cap and a learned sink would notice that keys are moved.
        if state.cache_form is not None and self._softmax == (None, False):
            state.cache_form.set_centres(key_centres(self.model_runner, named, rotaries))
        sink_logits = partial(sink_logits_of, impls, state.num_query_heads, state.pages.buffer.device)
        compressor = Compressor(state, rotaries, impls[0].scale, curves, sink_logits, soft_cap_of(impls[0]))
        block_rows = BlockRows(self.model_runner, self._group)
        store = opened(state.config)
        stored = None if store is None else StoredSegments(state, store, ranks.number, ranks.count, self._about(state))
        self.kv_compression = Runtime(state, compressor, ranks, block_rows, self.wait_for_device, stored)
        for index, layer in enumerate(layers):
            assert isinstance(layer.impl, Bindable)
            layer.impl.bound = BoundLayer(state, index)

    def compile_or_warm_up_model(self) -> Any:
        """Test the kernels on this device, which compiles them, before vLLM records any of them in a graph.

        Raises:
            UnsupportedFeature: a kernel of this rank or of another does not compute what it should.
        """
        # On a CPU pages are read by vLLM's own kernels, and torch does the rest.
        if self.page_format is TokenPages and self.self_tested is None and self.kv_compression is not None:
            state = self.kv_compression.state
            assert isinstance(state.pages, TokenPages)
            subject = Subject(
                self._layer_views,
                state.geometry,
                state.pages,
                state.num_query_heads,
                block_table_columns(self.model_runner, self._group),
                current_platform.num_compute_units(state.pages.buffer.device.index or 0),
                *self._softmax,
                query_dtype=state.dtype,
            )
            self.self_tested = test_at_start_up(subject, self.kv_compression.ranks)
        return super().compile_or_warm_up_model()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Do what the scheduler asks for, then run the step."""
        if (compression := self.kv_compression) is None:
            return super().execute_model(scheduler_output)
        compression.before_step(scheduler_output)
        output = super().execute_model(scheduler_output)
        compression.after_step()
        return compression.with_answers(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """The step's second half, where the model runner has one."""
        output = super().sample_tokens(*args, **kwargs)
        return output if self.kv_compression is None else self.kv_compression.with_answers(output)

    def kv_compression_report(self, newest: int) -> dict[str, Any]:
        """Totals since start, the pool as it is now, and what became of the last so many requests, the newest first.

        JSON-serialisable; for `collective_rpc`.
        """
        ledger = self._ledger
        return {"stats": ledger.stats(), "newest": ledger.newest(newest)}

    def kv_compression_request(self, request_id: str) -> dict[str, Any] | None:
        """What became of one request, None if it is not known (any more); for `collective_rpc`."""
        return self._ledger.find(request_id)

    def kv_compression_block_bytes(self) -> int:
        """Bytes of a block on all ranks; for `collective_rpc`."""
        assert self.kv_compression is not None
        return self.kv_compression.block_bytes

    def kv_compression_flush(self, seconds: float) -> bool:
        """Wait until all segments that were made are in the store, or some time is over; for `collective_rpc`. Returns
        whether they are.
        """
        return self._stored is None or self._stored.store.flush(seconds)

    def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM's; what is in the store is of other weights from now on."""
        self._leave_store()
        super().update_weights(*args, **kwargs)

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM's; likewise."""
        self._leave_store()
        super().reload_weights(*args, **kwargs)

    def _leave_store(self) -> None:
        if self._stored is not None:
            self._stored.leave()

    @property
    def _stored(self) -> StoredSegments | None:
        """The store's segments; None without a store, and until there is a KV cache."""
        return None if self.kv_compression is None else self.kv_compression.stored

    def shutdown(self) -> None:
        """See vLLM's; what is still to be written to the store gets some time for it."""
        if self._stored is not None:
            self._stored.store.close(PATIENCE_SECONDS)
        super().shutdown()

    def _about(self, state: CompressionState) -> dict[str, str]:
        """What a file in the store says of who wrote it, for people: its name says what it is."""
        config, model = state.config, self.model_config
        return {
            "model": str(model.model),
            "dtype": str(model.dtype),
            "block_size": str(self.cache_config.block_size),
            "method": config.method,
            "kept": config.amount,
            "budget": config.budget,
            "written_by": f"kvsculpt-vllm {__version__}, vLLM {vllm.__version__}",
        }

    @property
    def _ledger(self) -> Ledger:
        assert self.kv_compression is not None  # a server that has no KV cache yet answers nobody
        return self.kv_compression.ledger

    def wait_for_device(self) -> None:
        """Wait until the device is done with what a slice has launched. Otherwise the step would wait for it, however
        short the slice took. A CPU is done at once.
        """
