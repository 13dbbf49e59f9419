"""No step of serving waits for the device: whatever would, raises here. Solves do wait, seldom (`test_launches.py`)."""

from types import SimpleNamespace

import pytest
import torch
import triton

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.commands import (
    AdoptCommand,
    CommitCommand,
    ForgetCommand,
    Pace,
    SampleCommand,
    UnsampleCommand,
    attach,
)
from kvsculpt_vllm.engine.shared.record import CompressionRecord
from kvsculpt_vllm.engine.worker.attention_triton import SculptTritonImpl, SculptTritonMetadataBuilder
from kvsculpt_vllm.engine.worker.compressor import Compressor
from kvsculpt_vllm.engine.worker.pages import TokenPages
from kvsculpt_vllm.engine.worker.runtime import Runtime
from kvsculpt_vllm.engine.worker.state import BoundLayer, CompressionState
from kvsculpt_vllm.engine.worker.worker import SculptWorkerMixin
from launches import NoWaits, Waited

DEVICE = torch.device("meta")
LAYERS, KV_HEADS, HEADS, HEAD_SIZE, BLOCK, BLOCKS = 3, 2, 6, 64, 16, 40
RECORD = CompressionRecord(
    *("r", "sculpt", 0.3, "adaptive", "fast", 100, 64, 20.0, 7, 4, 0, 0, 0, 0.1, 0.2, 0.1, 0, 0, 0, [], [])
)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


class ForwardPass:
    """vLLM's worker as far as we are over it: attention of all layers for the rows of the step."""

    def execute_model(self, output):
        new, padding = list(output.num_scheduled_tokens.values()), output.padding
        self.runner.input_batch.req_ids = list(output.num_scheduled_tokens)
        begins, tokens = torch.tensor([0, *new]).cumsum(0).int(), sum(new) + padding
        common = SimpleNamespace(
            num_reqs=len(new),
            num_actual_tokens=tokens,
            max_query_len=max(new),
            query_start_loc=empty(len(new) + 1, dtype=torch.int32),
            query_start_loc_cpu=begins,
            seq_lens=empty(len(new), dtype=torch.int32),
            block_table_tensor=empty(len(new), 20, dtype=torch.int32),
        )
        metadata = self.builder.build(0, common)
        for impl in self.layers:
            projected = empty(tokens, HEADS + 2 * KV_HEADS, HEAD_SIZE)
            query, key, value = projected.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            impl.do_kv_cache_update(None, key, value, None, empty(tokens, dtype=torch.int64))
            impl.forward(None, query, key, value, None, metadata, empty(tokens, HEADS * HEAD_SIZE))


class Worker(SculptWorkerMixin, ForwardPass):
    """Ours over it."""

    def __init__(self):
        self.runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=[]))
        views = list(empty(LAYERS, BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_SIZE).unbind(0))
        config = CompressionConfig(method="sculpt")
        self.state = state = CompressionState(config, self.runner, TokenPages, views, HEADS, 4, views[0].dtype)
        ranks = SimpleNamespace(gather=lambda value: [[value]], is_first=True, is_heard=True)
        self.rows = {}
        block_rows = SimpleNamespace(replace=self.rows.__setitem__)
        compressor = Compressor.__new__(Compressor)
        compressor.state = state

        def wait():
            raise Waited("the stream")

        self.kv_compression = Runtime(state, compressor, ranks, block_rows, wait)
        self.layers = [SculptTritonImpl(HEADS, HEAD_SIZE, 0.125, KV_HEADS) for _ in range(LAYERS)]
        for index, impl in enumerate(self.layers):
            impl.bound = BoundLayer(state, index)
        self.builder = SculptTritonMetadataBuilder.__new__(SculptTritonMetadataBuilder)
        self.builder._first_impl, self.builder._chunks = self.layers[0], 528

    def step(self, scheduled, commands=(), new=(), computed=(), finished=(), preempted=(), padding=0):
        """One step: new tokens by request, those of `new` being requests that have just come."""
        computed = dict(computed)
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            scheduled_new_reqs=[
                SimpleNamespace(req_id=name, num_computed_tokens=0, sampling_params=SimpleNamespace(extra_args={}))
                for name in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=list(dict(computed)), num_computed_tokens=[*dict(computed).values()]
            ),
            finished_req_ids=set(finished),
            preempted_req_ids=set(preempted),
            padding=padding,
        )
        attach(output, list(commands))
        self.execute_model(output)


@pytest.fixture
def device(monkeypatch):
    """Takes the place of a GPU and lets nobody wait for it. Kernels are counted and not run."""
    with NoWaits() as device, torch.no_grad():
        monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", device.kernel)
        yield device


def test_steps_that_sample_and_publish_and_lose_requests_do_not_wait(device):
    worker = Worker()
    state, launched = worker.state, device.launches
    worker.step({"r": 96}, [SampleCommand("r", 0, 96)], new=["r"])
    assert state.samples["r"].covers(0, 96)
    # A prefill beside a row that decodes, in a batch with padding; then rows that all decode.
    worker.step({"r": 1, "s": 40}, [SampleCommand("s", 0, 40)], new=["s"], computed={"r": 96}, padding=7)
    before = launched["kernel"]
    worker.step({"r": 1, "s": 1}, [Pace(False)], computed={"r": 97, "s": 40})
    assert launched["kernel"] == before + 2 + 3 * LAYERS  # the plan; entries stored, chunks attended to, parts merged
    # A segment that was solved is read from now on, by another request, too.
    lengths = torch.ones(LAYERS, KV_HEADS, dtype=torch.int64)
    state.directory.prepare("r", lengths, lengths, 4)
    state.solved["r"] = RECORD
    rows = {"r": [5, 6, 0, 0, 9], "s": [5, 6, 0, 0, 11]}
    commit = CommitCommand("r", [5, 6], {"r": rows["r"]}, {"r": 64}, 2, 0)
    worker.step({"r": 1, "s": 1}, [commit, AdoptCommand({"s": rows["s"]}, {"s": 0})], computed={"r": 98, "s": 41})
    assert worker.rows == rows and 5 in state.directory
    worker.step({"s": 1}, [UnsampleCommand(["s"]), ForgetCommand([5])], computed={"s": 42}, finished=["r"])
    worker.step({"t": 20}, new=["t"], preempted=["s"])
    assert not state.samples and 5 not in state.directory


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool((x > 0).any())),
        ("nonzero", lambda x: x.nonzero()),
        ("index", lambda x: x[x > 0]),
        ("copy to cpu", lambda x: x.cpu()),
        ("copy to cpu", lambda x: x.tolist()),
        ("copy to meta", lambda x: torch.tensor([1.0, 2.0]).to(DEVICE)),
    ],
)
def test_what_waits_for_a_device_raises(device, name, waits):
    with pytest.raises(Waited, match=name):
        waits(empty(3))
