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


def check_chains(ours: dict[str, Any]) -> None:
    """What became of a document of 1,200 tokens, another question about it, a later turn, its beginning alone, three
    prompts at once that share 880 tokens, and a long answer to a short prompt, each a batch, in segments of 256 tokens,
    128 of an answer's.
    """
    told = [batch[0] for batch in ours["told"]]
    assert [(t["outcome"], t["tokens_found"], t["tokens_sculpted"], t["segments"]) for t in told[:4]] == [
        ("compressed", 0, 1120, 4),
        ("found", 1120, 0, 4),
        ("found", 1120, 0, 4),
        ("found", 512, 0, 2),
    ]
    made, *adopted = ours["told"][4]
    assert made["tokens_sculpted"] == 800
    assert [(t["outcome"], t["reason"], t["tokens_found"]) for t in adopted] == [("found", "adopted", 800)] * 2
    # 450 tokens at the end, of which at most a segment, the window and what is computed beside stay exact.
    assert told[5]["outcome"] == "compressed" and told[5]["tokens_sculpted"] >= 450 - 128 - 64 - 32
    assert ours["preemptions"] >= 2  # that is how it was computed anew
    assert ours["free"][-1][-1] == ours["free_at_start"]
