"""How often a computation gives a GPU something to do, and how often it waits for it, counted without a GPU."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOTHING_TO_DO = {
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh"),
    *("_unsafe_view", "_reshape_alias"),
}
"""Operations that launch nothing, besides views."""

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "_linalg_check_errors", "equal"}
"""Operations whose result, or its shape, the host must know."""


class Launches(TorchDispatchMode):
    """Counts what a computation would do on a GPU if it were given tensors there instead of on the device "meta".

    Those have shapes, dtypes and strides, and no numbers; the host's own tensors are real. A launch is an operation on
    the device that is neither a view nor an allocation; so is a Triton kernel, if `kernel` takes the place of what runs
    it. A wait is an operation whose result the host needs, an index by a mask or from the host, or a copy between host
    and device that is not said to be non-blocking.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def kernel(self, *args, **kwargs) -> None:
        """Stands for `triton.JITFunction.run`."""
        self.launches["kernel"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, device = function._schema.name.split("::")[1], kwargs.get("device")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not any(x.is_meta for x in tensors) and (device is None or torch.device(device).type == "cpu"):
            return function(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            return self._copied(function, name, args, kwargs)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        index = name.startswith("index")
        by_mask = index and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
        from_host = any(x.dim() and not x.is_meta for x in tensors)
        assert index or not from_host, f"{name} of tensors on the device and on the host"
        if name in WAITS or by_mask or from_host:
            self.waits[name] += 1
        elif not view and name not in NOTHING_TO_DO:
            self.launches[name] += 1
        return function(*args, **kwargs)

    def _copied(self, function, name, args, kwargs):
        to, source = (args[0], args[1]) if name == "copy_" else (None, args[0])
        target = to.device if to is not None else torch.device(kwargs.get("device") or source.device)
        if target.type == source.device.type:
            self.launches[name] += 1
            return function(*args, **kwargs)
        if not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])):
            self.waits[f"copy to {target.type}"] += 1
        if to is not None:
            return to
        # Whatever it is that comes back: it is finite.
        return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=target)


class Waited(BaseException):
    """The host waited for the device. No exception, so that nobody goes on after it."""


class _Refused(Counter):
    def __setitem__(self, name: str, count: int) -> None:
        raise Waited(name)


class NoWaits(Launches):
    """The same, and a wait raises `Waited`, with the operation's name, where it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = _Refused()
