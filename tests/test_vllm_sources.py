"""The Python of a wheel is taken out of it as it was pinned, whole or not at all."""

import base64
import hashlib
import marshal
import zipfile

import pytest

from vllm_sources import Wheel, sources

FILES = {"vllm/__init__.py": b"x = 1", "vllm/v1/deep.py": b"y = 2", "vllm/_C.abi3.so": b"\0" * 1000}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Makes a wheel of a version 9.9; its files may not be those of its record."""
    monkeypatch.setenv("KVSCULPT_CACHE", str(tmp_path / "cache"))

    def make(**damaged):
        digests = {name: base64.urlsafe_b64encode(hashlib.sha256(content).digest()) for name, content in FILES.items()}
        lines = [f"{name},sha256={digest.rstrip(b'=').decode()},{len(FILES[name])}" for name, digest in digests.items()]
        record = "\n".join([*lines, "vllm-9.9.dist-info/RECORD,,"]).encode()
        path = tmp_path / "vllm-9.9.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {**FILES, **damaged, "vllm-9.9.dist-info/RECORD": record}.items():
                archive.writestr(name, content)
        return Wheel("9.9", path.as_uri(), hashlib.sha256(record).hexdigest())

    return make


def test_only_python_is_taken_and_only_once(wheel, tmp_path):
    folder = sources(pinned := wheel())
    assert folder == tmp_path / "cache/vllm/9.9/site-packages"
    there = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    compiled = {name: there.pop(name) for name in list(there) if name.endswith(".pyc")}
    assert there == {name: content for name, content in FILES.items() if name.endswith(".py")}
    code = {marshal.loads(content[16:]).co_filename for content in compiled.values()}
    assert code == {str(folder / name) for name in there}  # and not where it was compiled
    (tmp_path / "vllm-9.9.whl").unlink()
    assert sources(pinned) == folder


def test_what_is_damaged_or_another_wheel_or_not_there_is_told_and_leaves_nothing(wheel, tmp_path):
    with pytest.raises(RuntimeError, match=r"vllm/v1/deep.py of .* is damaged"):
        sources(wheel(**{"vllm/v1/deep.py": b"y = 3"}))
    with pytest.raises(RuntimeError, match="is not the wheel that was pinned"):
        sources(Wheel("9.9", wheel().url, "0" * 64))
    with pytest.raises(RuntimeError, match=r"cannot read file:///nowhere.*: the tests of vLLM 9.9 need PyPI"):
        sources(Wheel("9.9", "file:///nowhere/vllm.whl", "0" * 64))
    assert not list((tmp_path / "cache/vllm/9.9").iterdir())
