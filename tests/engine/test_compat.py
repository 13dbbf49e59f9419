"""Every function of vLLM that is replaced or overridden is where it was, with the parameters it had."""

import inspect

import pytest

from kvsculpt_vllm.engine.compat.patcher import Patch, apply, is_applied
from kvsculpt_vllm.engine.compat.patches import PATCHES
from kvsculpt_vllm.engine.compat.scheduler import SchedulerHooks


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_vllm_has_what_we_patch(patch):
    owner, name = patch.find()
    stock = inspect.unwrap(getattr(owner, name))  # also where another test has applied the patch
    assert tuple(inspect.signature(stock).parameters) == patch.parameters
    assert patch.can_go_when


def test_every_private_method_that_the_scheduler_overrides_is_declared():
    declared = {patch.target.rpartition(".")[2] for patch in PATCHES}
    overridden = {name for name in vars(SchedulerHooks) if name.startswith("_") and not name.startswith("__")}
    assert overridden and overridden <= declared


class Stock:
    """Stands for a class of vLLM."""

    def method(self, x):
        return x

    @staticmethod
    def static(x):
        return x


def twice(stock):
    return lambda *args: 2 * stock(*args)


@pytest.mark.parametrize("name", ["method", "static"])
def test_a_patch_is_applied_once_and_keeps_what_kind_of_method_it_is(monkeypatch, name):
    monkeypatch.setattr(Stock, name, inspect.getattr_static(Stock, name))  # undone after the test
    patch = Patch(f"{__name__}:Stock.{name}", ("x",), "never")
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(Stock=Stock))
    assert not is_applied(patch)
    apply(patch, twice)
    apply(patch, twice)
    assert is_applied(patch)
    assert getattr(Stock(), name)(4) == 8


def test_a_patch_of_one_object_leaves_the_others(monkeypatch):
    patch = Patch(f"{__name__}:Stock.method", ("self", "x"), "never")
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(Stock=Stock))
    one, other = Stock(), Stock()
    apply(patch, twice, instance=one)
    apply(patch, twice, instance=one)
    assert (one.method(4), other.method(4)) == (8, 4)


def test_a_function_that_has_gone_is_named():
    with pytest.raises(AttributeError, match="not_there"):
        Patch("vllm.plugins:not_there", (), "never").find()
