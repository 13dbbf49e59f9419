"""What a configuration is refused for: all rules, in the order in which people read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvsculpt_vllm.engine.startup.refusals import cache, models, settings, windows
from kvsculpt_vllm.engine.startup.refusals.refusal import Refusal, refuse

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

# Read after vLLM has made its configuration. Rules about the engine's arguments, which vLLM changes on the way, are
# in `_of_args`.
RULES = (
    *settings.FEATURES,
    *models.CACHED,
    *windows.WINDOWS,
    *models.LAYERS,
    *cache.DTYPES,
    *models.ATTENTION,
    *settings.FRONTEND,
    *cache.BLOCKS,
)


def known_refusals() -> list[Refusal]:
    """Every refusal that a configuration can bring about, for people to read."""
    return [rule.refusal for rule in RULES]


def check_attention_backend(args: EngineArgs) -> None:
    """Refuse another attention backend where compression needs its own; asking for ours is fine.

    Raises:
        UnsupportedFeature: naming the one that was asked for.
    """
    config = args.attention_config
    asked = {args.attention_backend, config.backend, *config.backend_per_kind.values()}
    names = sorted({str(getattr(backend, "name", backend)) for backend in asked - {None}} - {"CUSTOM"})
    if names:
        cause = "compressed rows are read by a kernel of our own"
        refuse([Refusal(f"the attention backend {', '.join(names)}", cause, "remove --attention-backend")])


def check_config(args: EngineArgs, config: VllmConfig) -> None:
    """Refuse every unsupported feature that the configuration shows, all in one error.

    Args:
        args: what the user gave; vLLM resolves or drops some of it on the way to `config`.
        config: what vLLM made of it.

    Raises:
        UnsupportedFeature: naming each feature, why, and what to do.
    """
    found = [*_of_args(args), *(rule.refusal for rule in RULES if rule.found(config))]
    refuse(dict.fromkeys(found))


def _of_args(args: EngineArgs) -> Iterable[Refusal]:
    own = "compression runs in its own, which cannot be combined with another"
    if args.worker_cls != "auto":
        yield Refusal("a worker class of your own", own, "remove --worker-cls")
    if args.scheduler_cls is not None:
        yield Refusal("a scheduler class of your own", own, "remove --scheduler-cls")
    if args.enable_dbo:  # dropped by vLLM on a CPU, with a warning
        yield next(rule.refusal for rule in RULES if rule.refusal.feature.startswith("dual batch"))
