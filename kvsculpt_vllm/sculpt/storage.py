"""What a cache makes of the keys and values that are given to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvsculpt_vllm.kernels.pages import FP8
from kvsculpt_vllm.sculpt.transfer import on_device

ROOM = 2.0
"""What is stored later may be so many times as large as the largest of what scales were chosen for."""


def in_fp8(numbers: Tensor) -> Tensor:
    """The nearest numbers of FP8; what is too large becomes the largest one."""
    most = torch.finfo(FP8).max
    return numbers.clamp(-most, most).to(FP8)


@dataclass(frozen=True)
class Form:
    """How a cache of FP8 holds the keys, or the values, of B heads.

    A number in the cache times its head's scale is an element of the entry, in the basis of the `turn` and from the
    `centres` on (`sculpt.turned`). Scales are powers of two: FP8 is as precise at 300 as at 3, so that others would
    gain nothing.
    """

    scales: Tensor  # (B,) powers of two
    turn: Tensor | None = None  # (D, D), its own inverse; None for the model's own basis
    centres: Tensor | None = None  # (B, D); None for 0

    @classmethod
    def of(cls, entries: Tensor, turn: Tensor | None = None, centres: Tensor | None = None) -> Form:
        """Choose scales for `entries` (B, n, D)."""
        form = cls(torch.ones(len(entries), device=entries.device), turn, centres)
        largest = form._scaled(entries).abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
        scales = torch.exp2(torch.ceil(torch.log2(largest * ROOM / torch.finfo(FP8).max)))
        return replace(form, scales=scales)

    def take(self, index: Tensor | slice) -> Form:
        """Keep the heads in `index` (LongTensor or slice)."""
        return Form(self.scales[index], self.turn, None if self.centres is None else self.centres[index])

    def numbers(self, entries: Tensor) -> Tensor:
        """What the cache holds of `entries` (…, B, m, D), in FP8."""
        return in_fp8(self._scaled(entries))

    def meant(self, numbers: Tensor) -> Tensor:
        """The entries (…, B, m, D) that `numbers` in the cache are, float32."""
        entries = numbers.float() * self.scales[:, None, None]
        if self.turn is not None:
            entries = entries @ self.turn
        return entries if self.centres is None else entries + self.centres[:, None]

    def rounded(self, entries: Tensor) -> Tensor:
        """What the cache makes of `entries` (…, B, m, D), float32."""
        return self.meant(self.numbers(entries))

    def _scaled(self, entries: Tensor) -> Tensor:
        entries = entries.float()
        if self.centres is not None:
            entries = entries - self.centres[:, None]
        if self.turn is not None:
            entries = entries @ self.turn
        return entries / self.scales[:, None, None]


@dataclass(frozen=True)
class Storage:
    """A cache that rounds what it is given to a `dtype`, or where it has them to the `forms` of keys and of values."""

    dtype: torch.dtype
    forms: tuple[Form, Form] | None = None

    @property
    def result_dtype(self) -> torch.dtype:
        """That of what is handed to the cache; what forms have rounded already is not rounded again on the way."""
        return self.dtype if self.forms is None else torch.float32

    def take(self, index: Tensor | Sequence[int]) -> Storage:
        """Keep the heads in `index`."""
        if self.forms is None:
            return self
        of_keys, of_values = self.forms
        there = on_device(index, of_keys.scales.device)
        return replace(self, forms=(of_keys.take(there), of_values.take(there)))

    def keys(self, keys: Tensor) -> Tensor:
        """What `keys` (…, B, m, D) are in the cache, float32."""
        return keys.to(self.dtype).float() if self.forms is None else self.forms[0].rounded(keys)

    def values(self, values: Tensor) -> Tensor:
        """What `values` (…, B, m, D) are in the cache, float32."""
        return values.to(self.dtype).float() if self.forms is None else self.forms[1].rounded(values)

    def coarse_keys(self, keys: Tensor) -> Tensor:
        """What `keys` (…, B, m, D) are in the cache where that differs from them so much that a fit had better know;
        themselves where it does not.
        """
        return keys if self.forms is None else self.forms[0].rounded(keys)

    def coarse_values(self, values: Tensor) -> Tensor:
        """The same of `values` (…, B, m, D)."""
        return values if self.forms is None else self.forms[1].rounded(values)
