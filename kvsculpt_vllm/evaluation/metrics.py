"""How far the answers from a compressed cache are from those of the full one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS = 64
"""Tokens compared at a time: a large vocabulary in float64 takes a megabyte a token."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of each of the T tokens of one continuation; all arrays are (T,)."""

    kl: np.ndarray  # KL(full || compressed) of the next-token distributions, in nats
    agree: np.ndarray  # bool, both find the same token the most likely
    nll_full: np.ndarray  # -log p of the true next token, from the full cache
    nll: np.ndarray  # the same from the compressed cache


def compare(full: Tensor, compressed: Tensor, following: Sequence[int]) -> TokenScores:
    """Scores from two sets of logits (T, vocabulary) and the true next tokens (T,), in float64."""
    parts = []
    targets = torch.tensor(following, device=full.device)
    for ours, theirs, target in zip(compressed.split(ROWS), full.split(ROWS), targets.split(ROWS), strict=True):
        log_p, log_q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
        nll_full, nll = (-log.gather(1, target[:, None])[:, 0] for log in (log_p, log_q))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        parts.append((kl, theirs.argmax(-1) == ours.argmax(-1), nll_full, nll))
    return TokenScores(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def summarise(contexts: Sequence[TokenScores]) -> dict[str, float | list[float]]:
    """The numbers of one row, over all tokens of all contexts."""
    kl, agree, nll_full, nll = (
        np.concatenate([getattr(scores, name) for scores in contexts]) for name in ("kl", "agree", "nll_full", "nll")
    )
    return {
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1_agreement": float(agree.mean()),
        "ppl_full": float(np.exp(nll_full.mean())),
        "ppl": float(np.exp(nll.mean())),
        "kl_per_context": [float(scores.kl.mean()) for scores in contexts],
    }
