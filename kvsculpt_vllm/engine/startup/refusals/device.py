"""Devices for which there is no worker, or that do not compute what they should."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvsculpt_vllm.engine.startup.refusals.refusal import Refusal, UnsupportedFeature


def check_platform(platform: Any) -> None:
    """Refuse a device for which there is no worker. Kernels are tested on CUDA once there is a KV cache.

    Raises:
        UnsupportedFeature: on anything but a CPU and CUDA.
    """
    if not (platform.is_cpu() or platform.is_cuda()):
        name = platform.device_name.upper() if platform.device_name else "this device"
        cause = "there is no worker for them"
        raise UnsupportedFeature([Refusal(f"{name} devices", cause, "use --kv-compression none or the CPU build")])


def failed_self_test(failures: Iterable[str]) -> UnsupportedFeature:
    """The refusal of devices on which kernels do not compute what they should, each rank's failure in words."""
    cure = "please report this, and use --kv-compression none until it is mended"
    return UnsupportedFeature([Refusal("this device", f"its self-test failed: {words}", cure) for words in failures])
