"""Triton kernels, each beside a naive torch twin that says its formula; imported as ``kvsculpt_vllm.kernels``."""
