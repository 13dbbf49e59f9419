"""What the plugin uses of vLLM is where it was, with the parameters it had, in every vLLM that is supported.

The vLLM that is installed is imported. Of the one that has no CPU build the sources are read.
"""

import inspect
from pathlib import Path

import pytest
import vllm
from packaging.specifiers import SpecifierSet

import kvsculpt_vllm
from kvsculpt_vllm.engine.compat.patcher import Patch, apply, has, is_applied
from kvsculpt_vllm.engine.compat.patches import PATCHES
from kvsculpt_vllm.engine.compat.scheduler import SchedulerHooks
from kvsculpt_vllm.engine.compat.uses import USES
from kvsculpt_vllm.plugin import SUPPORTED_VLLM, installed_vllm
from vllm_sources import NEXT, installed, sources
from vllm_symbols import Sources, imported

INSTALLED = Sources(installed())
VERSIONS = {"0.32.0": None, NEXT.version: NEXT}  # and the wheel of what is not installed


@pytest.fixture(scope="module")
def sources_of():
    """The sources of a vLLM by its version."""
    return {version: INSTALLED if wheel is None else Sources(sources(wheel)) for version, wheel in VERSIONS.items()}


def test_every_supported_version_is_looked_at():
    minors = [f"0.{minor}.0" for minor in range(60) if f"0.{minor}.0" in SpecifierSet(SUPPORTED_VLLM)]
    assert minors == list(VERSIONS)


@pytest.mark.parametrize("patch", [p for p in PATCHES if p.is_for(installed_vllm())], ids=lambda patch: patch.target)
def test_vllm_has_what_we_patch(patch):
    owner, name = patch.find()
    stock = inspect.unwrap(getattr(owner, name))  # also where another test has applied the patch
    assert tuple(inspect.signature(stock).parameters) == patch.parameters
    assert patch.can_go_when


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("used", [*PATCHES, *USES], ids=lambda used: f"{used.target} {used.versions}".strip())
def test_every_vllm_has_what_is_declared(sources_of, used, version):
    there = sources_of[version]
    if not used.is_for(version):
        # Or else one declaration would do.
        assert not there.has(used.target) or there.parameters(used.target) != used.parameters
    elif used.parameters is None:
        assert there.has(used.target)
    else:
        assert there.has(used.target) and there.parameters(used.target) == used.parameters


IMPORTED = imported(Path(kvsculpt_vllm.__file__).parent, INSTALLED)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", IMPORTED)
def test_every_vllm_has_what_is_imported(sources_of, target, version):
    assert sources_of[version].has(target), f"{sorted(IMPORTED[target])} import it"


def test_sources_tell_what_importing_them_does():
    here = Sources(Path(vllm.__file__).parents[1])
    for patch in PATCHES:
        if patch.is_for(installed_vllm()):
            owner, name = patch.find()
            assert here.parameters(patch.target) == tuple(
                inspect.signature(inspect.unwrap(getattr(owner, name))).parameters
            )
    for gone in ("vllm.not_there", "vllm.plugins:not_there", "vllm.v1.core.block_pool:BlockPool.not_there"):
        assert not here.has(gone)
    assert len(IMPORTED) > 60 and "vllm.envs:VLLM_API_KEY" in IMPORTED


def test_a_release_candidate_is_taken_for_its_release():
    assert has(">=0.33", "0.33.0rc1") and has("<0.33", "0.32.1.dev3+gabc") and not has("<0.33", "0.33.0rc1+cu130")


def test_a_patch_of_another_version_is_passed_over(monkeypatch):
    patch = Patch("vllm.plugins:not_there", (), "never", versions="<0.1")
    apply(patch, lambda stock: pytest.fail("it was applied"))


def test_every_private_method_that_the_scheduler_overrides_is_declared():
    declared = {patch.target.rpartition(".")[2] for patch in PATCHES if patch.is_for(installed_vllm())}
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
