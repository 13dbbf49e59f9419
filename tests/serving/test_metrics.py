"""From the engines' books to Prometheus' text, and how the monitor asks for them; no engine."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.engine.exceptions import EngineDeadError

from kvsculpt_vllm.engine.shared.commands import PoolState, Settled, StoreState
from kvsculpt_vllm.engine.shared.ledger import Ledger
from kvsculpt_vllm.serving.metrics import text_of
from kvsculpt_vllm.serving.monitor import Monitor, totals_of_all
from kvsculpt_vllm.store.background import BackgroundStore
from kvsculpt_vllm.store.store import Store
from stored import segment


def report(skipped: int) -> dict:
    ledger = Ledger(10)
    for i in range(skipped):
        ledger.hear(Settled(f"r{i}", 5, "skipped", "short"))
    ledger.hear(PoolState(100, 20, skipped, 2, 1))
    return {"stats": ledger.stats(), "newest": ledger.newest(3)}


class Client:
    """Engines that answer after `gate`."""

    def __init__(self, *reports: dict) -> None:
        self.errored, self.reports, self.asked, self.gate = False, reports, 0, asyncio.Event()
        self.engine_core = SimpleNamespace(call_utility_all_async=self.answer)

    async def answer(self, utility, method, timeout, args, kwargs):
        assert (utility, method) == ("collective_rpc", "kv_compression_report")
        self.asked += 1
        await self.gate.wait()
        return [[given, "another rank's"] for given in self.reports]


def test_several_engines_are_told_apart_in_metrics_and_added_up_in_statistics():
    async def scenario():
        client = Client(report(2), report(3))
        client.gate.set()
        monitor = Monitor(client)
        assert text_of(monitor) == b""
        await monitor.refresh(1)
        return monitor

    monitor = asyncio.run(scenario())
    samples = {
        (sample.name, sample.labels.get("engine"), sample.labels.get("reason")): sample.value
        for family in text_string_to_metric_families(text_of(monitor).decode())
        for sample in family.samples
    }
    assert samples["kvsculpt:requests_total", "0", "short"] == 2
    assert samples["kvsculpt:requests_total", "1", "short"] == 3
    assert samples["kvsculpt:bytes_saved", "1", None] == 30
    total = totals_of_all(monitor.stats)
    assert total["requests"]["skipped"] == {"short": 5}
    assert total["pool"]["total"] == 200
    assert total["seconds"]["bounds"] == monitor.stats[0]["seconds"]["bounds"]
    assert len(monitor.newest) == 5


def test_a_store_has_metrics_where_there_is_one(tmp_path):
    def samples(stats):
        monitor = SimpleNamespace(age=0.0, stats=stats)
        families = text_string_to_metric_families(text_of(monitor).decode())
        told = [sample for family in families for sample in family.samples if "store_" in sample.name]
        return {(s.name, *(v for label, v in sorted(s.labels.items()) if label != "engine")): s.value for s in told}

    assert "kvsculpt:store_away" not in {name for name, *_ in samples([report(1)["stats"]])}
    background = BackgroundStore(Store(str(tmp_path), None, True), patience_s=30)
    ledger = Ledger(10, background)
    background.write(segment)
    background.write(segment)
    assert background.close(30)
    ledger.hear(StoreState(failures=3, unanswered=2, away=True))
    told = samples([ledger.stats()])
    assert told["kvsculpt:store_bytes_written_total",] > segment().nbytes
    assert told["kvsculpt:store_writes_refused_total", "there"] == 1
    assert told["kvsculpt:store_writes_refused_total", "too_large"] == 0
    assert told["kvsculpt:store_files_unusable_total", "cut_off"] == 0
    assert (told["kvsculpt:store_failures_total",], told["kvsculpt:store_unanswered_total",]) == (3, 2)
    assert (told["kvsculpt:store_away", "read"], told["kvsculpt:store_away", "write"]) == (1, 0)


def test_a_long_step_makes_nobody_wait_longer_than_they_want_and_is_asked_into_once():
    async def scenario():
        client = Client(report(1))
        monitor = Monitor(client)
        await asyncio.gather(*(monitor.refresh(0.01) for _ in range(5)))
        assert (monitor.age, client.asked) == (None, 1)
        client.gate.set()
        await monitor.refresh(1)
        assert client.asked == 1 and monitor.age < 1

    asyncio.run(scenario())


def test_of_old_numbers_only_the_age_is_told_where_another_server_may_have_told_newer_ones():
    async def scenario():
        monitor = Monitor(client := Client(report(1)))
        client.gate.set()
        await monitor.refresh(1)
        return monitor

    monitor = asyncio.run(scenario())
    assert b"kvsculpt:requests_total" in text_of(monitor, 60.0)
    monitor.heard_at -= 100
    assert b"kvsculpt:requests_total" not in text_of(monitor, 60.0)
    assert b"kvsculpt:stats_age_seconds 100" in text_of(monitor, 60.0)
    assert b"kvsculpt:requests_total" in text_of(monitor)


def test_a_dead_engine_is_not_asked():
    async def scenario():
        client = Client(report(1))
        client.errored = True
        with pytest.raises(EngineDeadError):
            await Monitor(client).refresh(0.01)
        assert client.asked == 0

    asyncio.run(scenario())


def test_the_grafana_dashboard_asks_for_metrics_that_exist():
    async def scenario():
        monitor = Monitor(client := Client(report(1)))
        client.gate.set()
        await monitor.refresh(1)
        return text_of(monitor).decode()

    families = list(text_string_to_metric_families(asyncio.run(scenario())))
    there = {sample.name for family in families for sample in family.samples} | {family.name for family in families}
    there.add("kvsculpt:requests_deferred_total")  # without a sample while none was
    dashboard = json.loads(Path(__file__).parents[2].joinpath("examples/grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"kvsculpt:\w+", expression)}
    assert asked and asked <= there
