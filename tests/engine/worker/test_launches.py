"""A solve on a GPU: how many kernels it launches and how often it waits, counted where there is none."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import triton

from kvsculpt_vllm.calibration_file import SHIPPED, read
from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.commands import SolveCommand
from kvsculpt_vllm.engine.worker.capture import QuerySample
from kvsculpt_vllm.engine.worker.compressor import Compressor
from kvsculpt_vllm.engine.worker.directory import Directory
from kvsculpt_vllm.engine.worker.pages import PageGeometry, TokenPages
from kvsculpt_vllm.kernels.dispatch import VARIABLE
from kvsculpt_vllm.sculpt import memory
from kvsculpt_vllm.sculpt.rotary import Rotary
from kvsculpt_vllm.sculpt.storage import Storage
from launches import Launches

LAYERS, KV_HEADS, HEADS, HEAD_SIZE, BLOCK = 28, 2, 12, 128, 16  # Qwen2.5-1.5B
WINDOW = 64


def counted(tokens, effort, calibrated):
    """Launches, waits and slices of the solve of one segment of `tokens`, its window among them, at keep ratio 0.3."""
    device, cells = torch.device("meta"), LAYERS * KV_HEADS
    span = tokens - WINDOW
    exact, packed = list(range(1, tokens // BLOCK + 1)), list(range(200, 200 + -(-3 * span // (10 * BLOCK))))
    with Launches() as launches, pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for of_device in (memory.BYTES, memory.GROUP_BYTES, memory.PADDING):
            patch.setitem(of_device, "meta", of_device["cuda"])
        patch.setenv(VARIABLE, "triton")
        patch.setattr(triton.runtime.jit.JITFunction, "run", launches.kernel)
        geometry = PageGeometry(LAYERS, KV_HEADS, BLOCK, cells, torch.empty(cells, dtype=torch.long, device=device))
        buffer = torch.empty(400 * cells, BLOCK * 2 * HEAD_SIZE, dtype=torch.bfloat16, device=device)
        sample = QuerySample(LAYERS, HEADS, HEAD_SIZE, like=buffer)
        sample.expect(0, tokens).seen = True
        state = SimpleNamespace(
            geometry=geometry,
            pages=TokenPages(buffer, geometry),
            num_query_heads=HEADS,
            dtype=buffer.dtype,
            storage=Storage(buffer.dtype),
            directory=Directory(400, 8, LAYERS, KV_HEADS, device),
            samples={"r": sample},
            config_of=lambda request_id: CompressionConfig(method="sculpt", keep_ratio=0.3, effort=effort),
        )
        rotary = Rotary(torch.empty(32768, HEAD_SIZE, dtype=torch.bfloat16, device=device), HEAD_SIZE, True)
        curves = read(SHIPPED / "Qwen2.5-Coder-1.5B-Instruct.json").whole if calibrated else None
        compressor = Compressor(state, [rotary] * LAYERS, HEAD_SIZE**-0.5, curves)
        command = SolveCommand("r", 0, tokens, 0, span, WINDOW, exact, [], packed, len(exact))
        launches.launches, launches.waits, slices = Counter(), Counter(), 0
        for _ in compressor.solve(command):
            slices += 1
    return launches.launches, launches.waits, slices


def test_a_solve_is_no_more_launches_and_waits_than_a_gpu_can_hide():
    launches, waits, slices = counted(2048, "fast", calibrated=True)
    print(sum(launches.values()), "launches,", sum(waits.values()), "waits,", slices, "slices")
    print(launches.most_common(), waits)
    assert 500 < sum(launches.values()) <= 2500
    assert sum(waits.values()) <= 20
