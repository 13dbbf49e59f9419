"""A worker tests its kernels once, before vLLM warms the model up and records graphs."""

from types import SimpleNamespace

import pytest
import torch

from kvsculpt_vllm.engine.startup.refusals.device import failed_self_test
from kvsculpt_vllm.engine.startup.refusals.refusal import UnsupportedFeature
from kvsculpt_vllm.engine.worker import worker
from kvsculpt_vllm.engine.worker.pages import PageGeometry, TokenPages, VectorPages

events = []


class Stock:
    def compile_or_warm_up_model(self):
        events.append("warm-up")
        return "times"


class Worker(worker.SculptWorkerMixin, Stock):
    """Of which vLLM has made a KV cache already."""

    def __init__(self, page_format=TokenPages):
        self.page_format, self.self_tested, self._group = page_format, None, 0
        self._softmax = 30.0, True
        self._layer_views = list(torch.zeros(2, 40, 3, 16, 32).unbind(0))
        geometry, buffer = PageGeometry.of(self._layer_views)
        state = SimpleNamespace(
            geometry=geometry, pages=TokenPages(buffer, geometry), num_query_heads=6, dtype=buffer.dtype
        )
        self.kv_compression = SimpleNamespace(state=state, ranks="ranks")
        table = SimpleNamespace(get_device_tensor=lambda rows: torch.zeros(rows, 77))
        self.model_runner = SimpleNamespace(input_batch=SimpleNamespace(block_table=[table]))


@pytest.fixture(autouse=True)
def tested(monkeypatch):
    """What the self-test was made on."""
    subjects = []

    def test_at_start_up(subject, ranks):
        assert ranks == "ranks"
        events.append("self-test")
        subjects.append(subject)
        return "report"

    events.clear()
    monkeypatch.setattr(worker, "test_at_start_up", test_at_start_up)
    return subjects


def test_it_comes_first_and_once_with_the_servers_own_numbers(tested):
    made = Worker()
    assert made.compile_or_warm_up_model() == made.compile_or_warm_up_model() == "times"
    assert events == ["self-test", "warm-up", "warm-up"]
    (subject,) = tested
    assert subject.views is made._layer_views and subject.table_columns == 77
    assert (subject.num_query_heads, subject.head_size, subject.num_blocks) == (6, 16, 40)
    assert (subject.soft_cap, len(subject.sink_logits)) == (30.0, 6)


def test_nothing_is_warmed_up_where_it_fails(monkeypatch):
    def failing(subject, ranks):
        raise failed_self_test(["loss: off by 1"])

    monkeypatch.setattr(worker, "test_at_start_up", failing)
    with pytest.raises(UnsupportedFeature, match="this device: its self-test failed: loss: off by 1"):
        Worker().compile_or_warm_up_model()
    assert events == []


def test_a_cpu_whose_pages_vllm_reads_has_nothing_to_test():
    assert Worker(VectorPages).compile_or_warm_up_model() == "times"
    assert events == ["warm-up"]
