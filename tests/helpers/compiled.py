"""Kernels compiled for an H100 where there is none, as a launch on it would have them compiled."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

VERSION = "3.7.1"
"""The Triton that vLLM 0.32's CUDA build brings, by way of torch 2.13. `setup.py` pins it for tests."""

H100 = GPUTarget("cuda", 90, 32)
BACKEND = CUDABackend(H100)
REGISTERS, SHARED, OF_SYSTEM = 65536, 228 << 10, 1024
"""Of one of its processors: registers, bytes of shared memory, and those of every program that are not its own."""


class Compiled(NamedTuple):
    """What the compiler made of one launch."""

    registers: int  # of a thread
    spilled: int  # bytes that a thread stores because its registers do not suffice
    shared: int  # KiB of a program
    programs: int  # that fit a processor at a time
    wide: float  # share that takes 16 bytes at once: of the copies to shared memory, or of all loads if there are none
    buffers: int  # places in shared memory for the tiles of one array, those on their way included; 0 without copies
    pending: int  # copies that may be on their way while a tile is multiplied: one of keys, one of values for each tile


def compiled(launch: Callable[[], object], folder: Path) -> dict[str, Compiled]:
    """What each kernel is compiled to that `launch` launches with tensors on the device "meta", by module and name.

    Types, constants and what is known of alignment are those of Triton's own launcher. `folder` is a cache that is
    empty: what is found in a cache has no log of its registers.
    """
    found = {}

    def run(self, *args, grid, warmup, **kwargs):
        bound, specialization, _ = create_function_from_signature(self.signature, self.params, BACKEND)(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(BACKEND, kwargs, bound, specialization, None)
        log = StringIO()
        with redirect_stdout(log):
            kernel = compile_kernel(
                ASTSource(self, signature, constants, attributes), target=H100, options=options.__dict__
            )
        found[f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"] = _measured(kernel, log.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(knobs.cache, "dir", str(folder))
        patch.setattr(knobs.nvidia, "dump_ptxas_log", True)
        launch()
    return found


def _measured(kernel, log: str) -> Compiled:
    ptx, ttgir = kernel.asm["ptx"], kernel.asm["ttgir"]
    loads = re.findall(r"ld\.global\S*", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)", ptx)
    wide = [int(size, 0) == 16 for size in copies] or [".v4" in load for load in loads]
    buffers = [int(number) for number in re.findall(r"memdesc<(\d+)x\d+x\d+x\w+,", ttgir)]
    waits = [int(number) for number in re.findall(r"async_wait.*?num = (\d+)", ttgir)]
    registers, threads = int(re.search(r"Used (\d+) registers", log)[1]), 32 * kernel.metadata.num_warps
    return Compiled(
        registers=registers,
        spilled=int(re.search(r"(\d+) bytes spill stores", log)[1]),
        shared=-(-kernel.metadata.shared // 1024),
        programs=min(REGISTERS // threads // (-(-registers // 8) * 8), SHARED // (kernel.metadata.shared + OF_SYSTEM)),
        wide=sum(wide) / len(wide),
        buffers=max(buffers, default=0),
        pending=max(waits, default=0),
    )
