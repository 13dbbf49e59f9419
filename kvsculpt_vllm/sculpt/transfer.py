"""Numbers that the host knows, given to a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(numbers: Sequence[int] | Sequence[float] | Sequence[list[int]] | Tensor, device: torch.device) -> Tensor:
    """The `numbers` as a tensor on `device`, without waiting for what the device has still to do.

    ``torch.tensor(numbers, device=device)`` would wait for all of it. From pinned memory a copy only queues up.
    """
    tensor = torch.as_tensor(numbers)
    if torch.cuda.is_available() and tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
