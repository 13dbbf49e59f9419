"""Triton's interpreter where vLLM looks for a driver."""

import os


def interpret_triton() -> None:
    """Run Triton's kernels on a CPU, with a stub where Triton wants a driver: vLLM's V2 model runner needs them."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import backends
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        def __init__(self):
            pass

        def _missing(self, *args):
            raise NotImplementedError("the interpreter needs no driver")

        is_active = staticmethod(lambda: True)
        get_current_target = map_python_to_cpp_type = get_benchmarker = get_active_torch_device = _missing
        instance = get_device_interface = _missing

    Driver.__abstractmethods__ = frozenset()
    backends.backends["cpu"] = backends.Backend(compiler=None, driver=Driver)
