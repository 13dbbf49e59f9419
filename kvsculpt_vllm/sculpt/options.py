"""The names a user may give, and what each means. Choices, help texts and docs are made from these."""

from __future__ import annotations

METHODS = {
    "sculpt": "keys and values optimised to give the same attention",
    "select": "the entries with the highest attention scores",
    "select_fit": "the same entries with values refitted by least squares",
}
"""What may take the place of a span's entries."""

BUDGETS = {
    "uniform": "as many entries for every layer and KV head",
    "adaptive": "more entries where attention needs them, the same number in total",
}
"""How the entries to keep are spread over layers and KV heads."""


def described(options: dict[str, str]) -> str:
    """`name: meaning.` of every option in a row."""
    return " ".join(f"{name}: {meaning}." for name, meaning in options.items())
