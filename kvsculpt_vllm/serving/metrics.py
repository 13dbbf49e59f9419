"""The engines' books in Prometheus' terms, prefix `kvsculpt:`. vLLM unregisters every collector named `vllm:`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvsculpt_vllm.engine.shared.reasons import Outcome
from kvsculpt_vllm.serving.monitor import Monitor

COUNTERS = {
    "span_tokens": "Prompt tokens whose KV cache was replaced.",
    "entries_kept": "KV entries kept in the place of those tokens, mean over layers and KV heads, sinks included.",
    "blocks_freed": "KV cache blocks that compressions gave back to vLLM's pool.",
    "bytes_freed": "Bytes of those blocks.",
    "solver_steps": "L-BFGS steps on keys, summed over layers and KV heads.",
    "segments": "Segments that were made.",
    "remade": "Of these, solves that were done again with more entries, because they lost more than max_error.",
}
FOUND = {
    "hits": ("segment_hits", "Requests that found a chain of segments for the beginning of their prompt."),
    "misses": ("segment_misses", "Requests that could have found one, and did not."),
    "adopted": ("segments_adopted", "Segments that took the place of tokens that a request had computed itself."),
    "evicted": ("segments_evicted", "Segments that could be found and cannot any more: their memory was needed."),
    "tokens_found": ("tokens_found", "Prompt tokens that were not computed, or not compressed, thanks to segments."),
    "store_hits": ("store_hits", "Look-ups in the store that found segments."),
    "store_misses": ("store_misses", "Look-ups in the store that found none, or had no answer in time."),
    "read": ("segments_read", "Segments that were read from the store into the KV cache."),
    "unreadable": ("segments_unreadable", "Segments that the store has and that could not be used."),
}
STORE = {
    "bytes_read": "Bytes of segments' files that the first rank has read from the store.",
    "bytes_written": "Bytes of segments' files that the first rank has written to the store.",
    "failures": "Operations on the store that the file system has refused.",
    "unanswered": "Look-ups and reads that the store has not answered in time, or for which it was not asked.",
}
POOL = {
    "total": ("pool_blocks", "KV cache blocks there are for requests."),
    "used": ("pool_blocks_used", "KV cache blocks held now."),
    "saved": (
        "blocks_saved",
        "KV cache blocks that stock vLLM would hold now besides the used ones; below 0 where it would hold fewer.",
    ),
    "bytes_saved": ("bytes_saved", "Bytes of those blocks."),
    "compressed": ("compressed_requests", "Requests running now from a compressed prompt."),
    "segments": ("segments_cached", "Segments that are kept in the prefix cache, for later requests to find."),
    "pending": ("pending_requests", "Requests whose prompt is computed and waits for its compression, or is in it."),
}


class StatsCollector(Collector):
    """The newest totals that were heard, unless older than `oldest` seconds; none before the first answer."""

    def __init__(self, monitor: Monitor, oldest: float) -> None:
        self._monitor, self._oldest = monitor, oldest

    def collect(self) -> Iterable[Metric]:
        """All families, one sample set an engine."""
        if self._monitor.age is None:
            return
        yield GaugeMetricFamily(
            "kvsculpt:stats_age_seconds",
            "Since when these numbers are: an engine answers between steps, and a compression can make one long.",
            self._monitor.age,
        )
        if self._monitor.age <= self._oldest:
            yield from families(self._monitor.stats)


def families(stats: list[dict[str, Any]]) -> Iterable[Metric]:
    """Metric families of the engines' totals (`Ledger.stats`)."""
    outcomes = " ".join(f"{o}: {o.meaning}." for o in Outcome if o != Outcome.DEFERRED)
    requests = CounterMetricFamily(
        "kvsculpt:requests",
        f"Requests by what became of their prompt, and why. {outcomes} One that is preempted counts again.",
        labels=["engine", "outcome", "reason"],
    )
    deferred = CounterMetricFamily(
        "kvsculpt:requests_deferred",
        "Requests that went on uncompressed for at least a step.",
        labels=["engine", "reason"],
    )
    counters = {
        name: CounterMetricFamily(f"kvsculpt:{name}", text, labels=["engine"]) for name, text in COUNTERS.items()
    }
    found = {
        key: CounterMetricFamily(f"kvsculpt:{name}", text, labels=["engine"]) for key, (name, text) in FOUND.items()
    }
    gauges = {key: GaugeMetricFamily(f"kvsculpt:{name}", text, labels=["engine"]) for key, (name, text) in POOL.items()}
    seconds = HistogramMetricFamily(
        "kvsculpt:compression_seconds", "Time to make one segment, in seconds.", labels=["engine"]
    )
    error = HistogramMetricFamily(
        "kvsculpt:held_out_error",
        "Error of one segment on queries that no fit has used (relative squared output error plus squared log-sum-exp "
        "error, mean over layers and heads). stage before: of selection alone; after: of what is in use.",
        labels=["engine", "stage"],
    )
    store = {
        name: CounterMetricFamily(f"kvsculpt:store_{name}", text, labels=["engine"]) for name, text in STORE.items()
    }
    refused = CounterMetricFamily(
        "kvsculpt:store_writes_refused",
        "Segments that were not written to the store, by reason; there: it has one that is as good.",
        labels=["engine", "reason"],
    )
    unusable = CounterMetricFamily(
        "kvsculpt:store_files_unusable",
        "Files in the store that were not used, by reason.",
        labels=["engine", "reason"],
    )
    away = GaugeMetricFamily(
        "kvsculpt:store_away",
        "1 while the store is left alone, because it fails or does not answer. operation read: it is not asked for "
        "segments; write: none are written to it.",
        labels=["engine", "operation"],
    )
    for index, totals in enumerate(stats):
        engine = str(index)
        for outcome, reasons in totals["requests"].items():
            for reason, count in (reasons or {"": 0}).items():
                requests.add_metric([engine, outcome, reason], count)
        for reason, count in totals["deferred"].items():
            deferred.add_metric([engine, reason], count)
        for name, counter in counters.items():
            counter.add_metric([engine], totals[name])
        for key, counter in found.items():
            counter.add_metric([engine], totals["found"][key])
        for key, gauge in gauges.items():
            gauge.add_metric([engine], totals["pool"][key])
        if counts := totals["store"]:
            for name, counter in store.items():
                counter.add_metric([engine], counts[name])
            for reason, count in counts["refused"].items():
                refused.add_metric([engine, reason], count)
            for reason, count in counts["unusable"].items():
                unusable.add_metric([engine, reason], count)
            away.add_metric([engine, "read"], int(counts["away"]))
            away.add_metric([engine, "write"], int(counts["writes_away"]))
        seconds.add_metric([engine], *_buckets(totals["seconds"]))
        for stage, histogram in totals["held_out_error"].items():
            error.add_metric([engine, stage], *_buckets(histogram))
    yield from (requests, deferred, *counters.values(), *found.values(), *gauges.values(), seconds, error)
    yield from (family for family in (*store.values(), refused, unusable, away) if family.samples)


def _buckets(histogram: dict[str, Any]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets and the sum, as Prometheus wants them."""
    bounds, total = [*map(str, histogram["bounds"]), "+Inf"], 0
    buckets = []
    for bound, count in zip(bounds, histogram["counts"], strict=True):
        total += count
        buckets.append((bound, total))
    return buckets, histogram["sum"]


def text_of(monitor: Monitor, oldest: float = math.inf) -> bytes:
    """Our part of `/metrics`; of totals older than `oldest` seconds only their age."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatsCollector(monitor, oldest))
    return generate_latest(registry)
