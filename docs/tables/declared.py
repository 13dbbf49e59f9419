"""What the code declares: flags, efforts, refusals, models, outcomes, reasons, metrics."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from .markdown import table
from .sources import ROOT, module


def flags() -> str:
    """One row a setting."""
    from kvsculpt_vllm.config import SERVER_ONLY, CompressionConfig, choices, flag, request_key

    body = []
    for field, info in CompressionConfig.model_fields.items():
        by_request = "–" if field in SERVER_ONLY else f"`{request_key(field)}`"
        options = ", ".join(f"`{option}`" for option in choices(field))
        meaning = f"One of {options}. {info.description}" if options else info.description
        body.append([f"`{flag(field)}`", by_request, f"`{info.default}`", meaning])
    return table(["flag", "in a request's `vllm_xargs`", "default", "meaning"], body)


def efforts() -> str:
    """What a fit may take."""
    from kvsculpt_vllm.sculpt.effort import EFFORTS

    header = ["effort", "positions that rank entries, at least", "positions a pilot is fitted to",
              "positions a fit uses", "key steps, at most"]  # fmt: skip
    return table(
        header,
        [
            [f"`{name}`", *(f"{n:,}" for n in (e.positions, e.pilot_positions, e.fit_positions, e.key_steps))]
            for name, e in EFFORTS.items()
        ],
    )


def refusals() -> str:
    """What a configuration can be refused for."""
    from kvsculpt_vllm.engine.startup.refusals.configuration import known_refusals

    return table(["refused at start-up", "because", "cure"], known_refusals())


def zoo() -> str:
    """Architectures that the tests run, and what becomes of each."""
    models = module(ROOT / "tests" / "helpers" / "zoo.py").ZOO
    return table(["model", "in particular", "with compression"], map(_model, models))


def _model(model: Any) -> list[str]:
    told = f"refused: {model.refused}" if model.refused else "exact"
    return [f"{model.name} (`{model.architecture}`)", model.particular, told]


def outcomes() -> str:
    """What can become of a prompt."""
    from kvsculpt_vllm.engine.shared.reasons import Outcome

    return table(["outcome", "meaning"], [[f"`{outcome}`", outcome.meaning] for outcome in Outcome])


def reasons() -> str:
    """Why, one row a reason."""
    from kvsculpt_vllm.engine.shared.reasons import Reason

    body = [[f"`{reason}`", reason.outcome, reason.meaning] for reason in Reason]
    return table(["reason", "outcome", "meaning"], body)


def metrics() -> str:
    """What `/metrics` shows besides vLLM's own."""
    from kvsculpt_vllm.engine.shared.commands import Deferred, Settled
    from kvsculpt_vllm.engine.shared.ledger import Ledger
    from kvsculpt_vllm.engine.shared.reasons import Outcome, Reason
    from kvsculpt_vllm.serving.metrics import StatsCollector
    from kvsculpt_vllm.store.background import BackgroundStore
    from kvsculpt_vllm.store.store import Store

    store = BackgroundStore(Store(str(ROOT), None, False), patience_s=1)  # nothing of it is looked at
    ledger = Ledger(block_bytes=1, store=store)  # one of each, so that every label shows
    ledger.hear(Settled("request", 1, Outcome.SKIPPED, Reason.OFF))
    ledger.hear(Deferred("request", 1, Reason.NO_FREE_BLOCKS))
    collector = StatsCollector(SimpleNamespace(age=0.0, stats=[ledger.stats()]), math.inf)
    body = []
    for family in collector.collect():
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels)
        name = family.name + ("_total" if family.type == "counter" else "")
        body.append([f"`{name}`", family.type, ", ".join(label for label in labels if label != "le"),
                     family.documentation])  # fmt: skip
    return table(["metric", "type", "labels", "meaning"], body)


TABLES = {
    "flags": flags,
    "efforts": efforts,
    "refusals": refusals,
    "zoo": zoo,
    "outcomes": outcomes,
    "reasons": reasons,
    "metrics": metrics,
}
