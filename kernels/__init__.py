"""Triton kernels, each beside a naive torch twin that says its formula; imported as ``kvsculpt_vllm.kernels``.

Only triton and torch are needed. `dispatch` decides which of the two runs.
"""
