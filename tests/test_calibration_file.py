"""The calibration's file: what is in it, what is refused, and which one a server takes."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoConfig

from kvsculpt_vllm import calibration_file
from kvsculpt_vllm.calibration_file import FILE, CalibrationError, CalibrationFile, ModelShape, StoredMaps, find, read
from kvsculpt_vllm.config import CompressionConfig, ConfigError
from kvsculpt_vllm.engine.startup.calibration_setting import resolved
from kvsculpt_vllm.engine.worker.rank_curves import curves_of_rank

LAYERS, HEADS = 3, 4
FRACTIONS = (0.1, 0.5, 1.0)


def shape(config, heads, group, size):
    """What is asked of vLLM's configuration of a model."""
    return {
        "hf_text_config": config,
        "get_sliding_window": lambda: None,
        "get_total_num_kv_heads": lambda: heads,
        "model_arch_config": SimpleNamespace(total_num_attention_heads=heads * group),
        "get_head_size": lambda: size,
    }


def loss(layer, head):
    """A head's losses, of which the first names it."""
    return (10.0 * layer + head + 1, 0.5, 0.0)


@pytest.fixture
def made():
    return CalibrationFile(
        model="m",
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        context=2048,
        texts={"pydoc": 4},
        fractions=FRACTIONS,
        losses=[[loss(layer, head) for head in range(HEADS)] for layer in range(LAYERS)],
    )


GROUP, SIZE = 4, 8
MAPPED = (0, 3), (1, 0), (2, 1)
WANTED = (0.25, 0.5, 0.125)


def maps():
    """Maps of three heads (N, G, D + 1, D): what they add is whole steps of a power of two."""
    shape = len(MAPPED), GROUP, SIZE + 1, SIZE
    steps = np.arange(np.prod(shape)).reshape(shape) % 128
    steps[:, :, 0] = 127
    return np.eye(SIZE + 1, SIZE) + steps * 2.0 ** -np.arange(SIZE)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model's directory, and an empty one of shipped files beside it."""
    monkeypatch.setattr(calibration_file, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("shipped", "m"):
        (tmp_path / name).mkdir()
    return tmp_path / "m"


def test_survives_its_file(made, tmp_path):
    followed = tuple(tuple(tuple(2 * loss for loss in head) for head in layer) for layer in made.losses)
    stored = StoredMaps.of(MAPPED, maps(), WANTED)
    for file in (made, made.model_copy(update={"followed_losses": followed, "query_maps": stored})):
        file.write(tmp_path / "c.json")
        assert read(tmp_path / "c.json") == file
    np.testing.assert_array_equal(file.part([1], [0, 2]).followed, 2 * file.part([1], [0, 2]).losses)
    assert made.whole.followed is None
    assert made.digest != file.digest
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def stored(**change):
    """Stored maps as they are in the file, of which something is different."""
    return StoredMaps.of(MAPPED, maps(), WANTED).model_dump(mode="json") | change


def test_a_map_of_numbers_that_are_too_large_is_refused():
    with pytest.raises(ValueError, match="not all finite"):
        StoredMaps.of(MAPPED, 1e6 * maps(), WANTED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [[[1, 0]]]}, "losses are not"),
        ({"num_layers": 2}, "losses are not"),
        ({"followed_losses": [[[1, 0]]]}, "followed_losses are not"),
        ({"num_kv_heads": 0}, "num_kv_heads .*greater than or equal to 1"),
        ({"fractions": [0.5, 0.1, 1.0]}, "do not ascend to 1"),
        ({"fractions": [0.1, 0.5, 0.9]}, "do not ascend to 1"),
        ({"format": 2}, "format .*should be 1"),
        ({"losses": "NaN"}, "losses"),
        ({"more": 1}, "more Extra"),
        ({"query_maps": stored(heads=[[0, 3], [1, 0]])}, r"steps: 864 bytes given, \(2, 4, 8\) of 9 bytes"),
        ({"query_maps": stored(heads=[[0, 3], [1, 0], [3, 0]])}, "query_maps are of layer 3, KV head 0"),
        ({"query_maps": stored(heads=[[1, 0], [0, 3], [2, 1]])}, "heads do not ascend"),
        ({"query_maps": stored(heads=[[0, -1], [1, 0], [2, 1]])}, "heads do not ascend"),
        ({"query_maps": stored(scales="AAAA")}, "scales: 3 bytes given"),
    ],
)
def test_what_is_no_calibration_is_refused(made, tmp_path, change, message):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(made.model_dump() | change))
    with pytest.raises(CalibrationError, match=rf"c\.json was not written by `kvsculpt calibrate`: .*{message}"):
        read(path)


def test_auto_is_the_models_own_before_the_shipped_one_of_its_name_and_shape(made, model):
    layout = ModelShape(LAYERS, HEADS, GROUP, SIZE)
    shape = str(model), layout
    assert find("auto", *shape) is None
    shipped = calibration_file.SHIPPED / "m.json"
    made.write(shipped)
    assert find("auto", *shape) == shipped
    assert find("auto", "org/m", layout) == shipped
    assert find("auto", str(model), layout._replace(num_layers=LAYERS + 1)) is None  # another model of that name
    assert find("auto", "org/n", layout) is None
    cached = model.parent / "models--org--m" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    assert find("auto", str(cached), layout) == shipped
    measured = calibration_file.measured_place(str(model))
    assert measured != calibration_file.measured_place(str(model.parent / "other" / "m"))
    measured.parent.mkdir(parents=True)
    made.write(measured)
    assert find("auto", *shape) == find("measure", *shape) == measured
    made.write(model / FILE)
    assert find("auto", *shape) == find("measure", *shape) == model / FILE
    (model / "m.gguf").touch()
    assert find("auto", str(model / "m.gguf"), layout) == model / FILE
    assert find("none", *shape) is None
    assert find(str(shipped), *shape) == shipped


def test_a_file_that_does_not_fit_stops_the_server(made, model):
    made.write(model / FILE)
    served = SimpleNamespace(model=str(model), **shape(SimpleNamespace(num_hidden_layers=LAYERS), HEADS, GROUP, SIZE))
    assert resolved(CompressionConfig(method="sculpt"), served).calibration == str(model / FILE)
    (model / "broken").write_text("{}")
    made.model_copy(update={"query_maps": StoredMaps.of(MAPPED, maps(), WANTED)}).write(model / "mapped")
    assert resolved(CompressionConfig(method="sculpt", calibration=str(model / "mapped")), served)
    served.get_head_size = lambda: 2 * SIZE
    with pytest.raises(
        ConfigError, match=f"maps of {GROUP} queries of size {SIZE} for each KV head, this model has 4 "
    ):
        resolved(CompressionConfig(method="sculpt", calibration=str(model / "mapped")), served)
    served.get_total_num_kv_heads = lambda: 2
    for given, why in (("auto", "3 layers of 4 KV heads, this one has 3 of 2"), ("broken", ""), ("absent", "No such")):
        with pytest.raises(ConfigError, match=f"--kv-compression-calibration: got .*{given}.*{why}"):
            setting = given if given == "auto" else str(model / given)
            resolved(CompressionConfig(method="sculpt", calibration=setting), served)


def test_the_first_start_measures_and_the_next_one_finds_the_file(first_layers_path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measure, auto = (CompressionConfig(method="sculpt", calibration=name) for name in ("measure", "auto"))
    # 2,048 positions: four contexts of 512 tokens.
    config = AutoConfig.from_pretrained(first_layers_path)
    config.max_position_embeddings = 2048
    served = SimpleNamespace(model=str(first_layers_path), **shape(config, 3, 3, 64))
    assert resolved(auto, served).calibration == "none"
    path = resolved(measure, served).calibration
    file = read(Path(path))
    assert Path(path).is_relative_to(tmp_path)
    assert (file.num_layers, file.num_kv_heads, file.context, file.texts) == (2, 3, 512, {"stdlib": 4})
    monkeypatch.setattr("subprocess.run", None)
    assert resolved(measure, served).calibration == resolved(auto, served).calibration == path


def test_a_model_that_cannot_be_measured_stops_the_server(model, capfd):
    (model / "config.json").write_text("{}")
    served = SimpleNamespace(model=str(model), **shape(SimpleNamespace(num_hidden_layers=LAYERS), HEADS, GROUP, SIZE))
    with pytest.raises(ConfigError, match=r"calibration: got 'measure', allowed: .*none.* cannot be calibrated"):
        resolved(CompressionConfig(method="sculpt", calibration="measure"), served)
    assert "kvsculpt calibrate:" in capfd.readouterr().err
    (model / "m.gguf").touch()
    served.model = str(model / "m.gguf")
    with pytest.raises(ConfigError, match="single file"):
        resolved(CompressionConfig(method="sculpt", calibration="measure"), served)


@pytest.mark.parametrize(
    ("world_size", "own", "heads"),
    [
        (1, 4, [[0, 1, 2, 3]]),
        (2, 2, [[0, 1], [2, 3]]),
        (8, 1, [[0], [0], [1], [1], [2], [2], [3], [3]]),  # two ranks hold each head
    ],
)
def test_a_rank_gets_the_curves_and_maps_of_its_layers_and_heads(made, tmp_path, world_size, own, heads):
    made.model_copy(update={"query_maps": StoredMaps.of(MAPPED, maps(), WANTED)}).write(tmp_path / "c.json")
    copies = max(1, world_size // HEADS)
    config = CompressionConfig(method="sculpt", calibration=str(tmp_path / "c.json"))
    names = [f"model.layers.{layer}.self_attn.attn" for layer in (1, 2)]
    for rank in range(world_size):
        found = curves_of_rank(config, names, own, rank, world_size)
        assert found.fractions == FRACTIONS
        mine = [(layer, head) for layer in (1, 2) for head in heads[rank]]
        np.testing.assert_array_equal(found.losses, [loss(*head) for head in mine])
        # Query heads are divided, too, where several ranks have the same KV head.
        queries = slice(rank % copies * GROUP // copies, (rank % copies + 1) * GROUP // copies)
        assert found.query_maps.heads == tuple(i for i, head in enumerate(mine) if head in MAPPED)
        which = [MAPPED.index(head) for head in mine if head in MAPPED]
        np.testing.assert_array_equal(found.query_maps.maps, maps()[which, queries])
        assert found.query_maps.wanted == tuple(WANTED[place] for place in which)
    assert curves_of_rank(CompressionConfig(method="sculpt", calibration="none"), names, own, 0, 1) is None
