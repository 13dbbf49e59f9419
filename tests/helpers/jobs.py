"""Parts of the jobs that `engine_job.py` runs."""

from typing import Any


def on(method: str = "select", keep_ratio: float = 0.3, **settings: Any) -> dict[str, Any]:
    """The engine's `additional_config` that compresses so."""
    return {"kv_compression": {"method": method, "keep_ratio": keep_ratio, **settings}}


def request(
    start: int,
    length: int,
    max_tokens: int = 24,
    *,
    after: int | None = None,
    priority: int | None = None,
    fault: str | None = None,
    sampling: dict[str, Any] | None = None,
    **extra_args: Any,
) -> dict[str, Any]:
    """One request: a prompt of `length` tokens that begins at token `start` of the document.

    Args:
        after: the step after which it arrives.
        fault: what goes wrong in its compression.
        sampling: more of its `SamplingParams`.
        extra_args: its own settings of compression, as in `vllm_xargs`.
    """
    optional = {"after": after, "priority": priority, "fault": fault, "sampling": sampling}
    return {
        "start": start,
        "length": length,
        "max_tokens": max_tokens,
        "extra_args": extra_args or None,
        **{name: value for name, value in optional.items() if value is not None},
    }
