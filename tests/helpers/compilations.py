"""For which arguments Triton would compile a kernel, counted in its interpreter, which compiles nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getcallargs

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

BACKEND = CUDABackend(GPUTarget("cuda", 90, 32))


@contextmanager
def compilations() -> Iterator[set[tuple]]:
    """The set of what would be compiled while the context lasts: kernel, types, constants, what is 1 and what is a
    multiple of 16, as Triton's own launcher tells them apart for an H100.
    """
    found, stock, binders = set(), InterpretedFunction.run, {}

    def run(self, *args, grid, warmup, **kwargs):
        if self.fn not in binders:
            options = {name: self.kwargs[name] for name in ("do_not_specialize", "do_not_specialize_on_alignment")}
            jitted = JITFunction(self.fn, **options)
            binders[self.fn] = create_function_from_signature(jitted.signature, jitted.params, BACKEND)
        given = {name: value for name, value in kwargs.items() if name in self.arg_names}
        key = binders[self.fn](**getcallargs(self.fn, *args, **given))[1]
        found.add((self.fn.__module__, self.fn.__name__, str(key)))
        return stock(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = run
    try:
        yield found
    finally:
        InterpretedFunction.run = stock
