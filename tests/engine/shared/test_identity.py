"""What a model is called in a store: alike on every machine, and otherwise once its keys and values would differ."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kvsculpt_vllm.engine.shared.identity import (
    SAMPLE_BYTES,
    SAMPLES,
    UnknownWeights,
    adapter_identity,
    model_identity,
    weights_digest,
)

LARGE = SAMPLE_BYTES * SAMPLES + 1
SMALL = {"a": torch.arange(40.0), "b": torch.arange(50.0).view(5, 10)}


def changed(tensors, name, place):
    """The tensors with one number that is another."""
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    copies[name].view(-1)[place] += 1
    return copies


@pytest.fixture
def digest_of(tmp_path):
    """The digest of a directory with these files, each a dict of tensors."""
    number = iter(range(100))

    def make(**files):
        directory = tmp_path / str(next(number))
        directory.mkdir()
        for name, tensors in files.items():
            save_file(tensors, directory / f"{name}.safetensors")
        return weights_digest(directory)

    return make


def test_the_same_weights_elsewhere_are_the_same(digest_of, tmp_path):
    digest = digest_of(one=SMALL, two=SMALL)
    (tmp_path / "0" / "README.md").write_text("Weights are not described by what lies beside them.")
    shutil.move(tmp_path / "0", tmp_path / "another name")
    assert weights_digest(tmp_path / "another name") == digest
    assert len(digest) == 64


@pytest.mark.parametrize(("name", "place"), [("a", 0), ("a", 17), ("a", -1), ("b", 0), ("b", 23), ("b", -1)])
def test_another_number_anywhere_in_a_small_file_is_another_model(digest_of, name, place):
    assert digest_of(model=SMALL) != digest_of(model=changed(SMALL, name, place))


def test_another_name_or_shape_or_file_is_another_model(digest_of):
    digests = {
        digest_of(model=SMALL),
        digest_of(weights=SMALL),
        digest_of(model=SMALL, more=SMALL),
        digest_of(model={"a": SMALL["a"], "c": SMALL["b"]}),
        digest_of(model={"a": SMALL["a"], "b": SMALL["b"].view(10, 5)}),
        digest_of(model={"a": SMALL["a"], "b": SMALL["b"].to(torch.int32)}),
    }
    assert len(digests) == 6


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", ["first", "middle", "one", "last"])
def test_in_a_large_file_both_ends_of_every_tensor_count(digest_of, name, place):
    """`middle` lies a megabyte from either end of its file."""
    large = {label: torch.zeros(LARGE // 4 + 1) for label in ("first", "middle", "last")} | {"one": torch.zeros(1)}
    assert digest_of(model=large) != digest_of(model=changed(large, name, place))


def test_training_a_little_changes_a_large_file(digest_of):
    """Not a number that one would have to look for: a step of an optimiser changes nearly all of them."""
    large = {"weight": torch.ones(LARGE)}
    assert digest_of(model=large) != digest_of(model={"weight": large["weight"] * (1 + 1e-6)})


def test_a_large_file_without_a_list_of_its_tensors_is_read_at_places_all_over_it(tmp_path):
    """As GGUF is, which vLLM takes as a file; what it is called and where it lies does not matter."""
    data = bytearray(SAMPLES * SAMPLE_BYTES * 2)
    digests = set()
    for place in (None, 0, len(data) // 255 * 100 + 50, len(data) - 1):
        spoilt = bytearray(data)
        if place is not None:
            spoilt[place] = 1
        file = tmp_path / f"{place}.gguf"
        file.write_bytes(spoilt)
        digests.add(weights_digest(file))
    assert len(digests) == 4
    digests.add(weights_digest((tmp_path / "None.gguf").rename(tmp_path / "renamed.gguf")))
    assert len(digests) == 4
    (tmp_path / "longer.gguf").write_bytes(data + b"\0")
    digests.add(weights_digest(tmp_path / "longer.gguf"))
    assert len(digests) == 5


def test_weights_that_are_not_there_are_told(tmp_path):
    with pytest.raises(UnknownWeights, match="there are no weights in"):
        weights_digest(tmp_path)
    for missing in (tmp_path / "none", tmp_path / "none.gguf"):
        with pytest.raises(UnknownWeights, match=f"{missing} cannot be read"):
            weights_digest(missing)


def test_an_adapter_is_its_weights_and_how_much_they_count_for(tmp_path):
    for name, alpha in (("one", 16), ("same", 16), ("twice", 32)):
        (tmp_path / name).mkdir()
        save_file(SMALL, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": alpha}))
    one, same, twice = (adapter_identity(tmp_path / name) for name in ("one", "same", "twice"))
    assert one == same != twice
    save_file(changed(SMALL, "b", 3), tmp_path / "one" / "adapter_model.safetensors")
    assert adapter_identity(tmp_path / "one") != one
    (tmp_path / "same" / "adapter_config.json").unlink()
    with pytest.raises(UnknownWeights, match="adapter_config"):
        adapter_identity(tmp_path / "same")


@pytest.fixture
def vllm_config(tmp_path):
    """What is read of vLLM's configuration, with a model's directory."""
    (tmp_path / "model").mkdir()
    save_file(SMALL, tmp_path / "model" / "model.safetensors")
    hf_config = {"hidden_size": 64, "rope_theta": 1e4, "_name_or_path": "here", "transformers_version": "5"}
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(tmp_path / "model"),
            revision=None,
            dtype=torch.bfloat16,
            quantization=None,
            quantization_config=None,
            max_model_len=4096,
            seed=0,
            hf_config=SimpleNamespace(to_dict=lambda: dict(hf_config), values=hf_config),
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
    )


def test_a_model_is_all_that_its_keys_and_values_depend_on(vllm_config):
    identity = model_identity(vllm_config)
    seen = {identity}
    for part, name, value in (
        ("model_config", "dtype", torch.float16),
        ("model_config", "quantization", "fp8"),
        ("model_config", "quantization_config", {"bits": 4}),
        ("cache_config", "cache_dtype", "float16"),
        ("parallel_config", "tensor_parallel_size", 2),
        ("parallel_config", "pipeline_parallel_size", 2),
    ):
        given, before = getattr(vllm_config, part), getattr(getattr(vllm_config, part), name)
        setattr(given, name, value)
        seen.add(model_identity(vllm_config))
        setattr(given, name, before)
    values = vllm_config.model_config.hf_config.values
    values["rope_theta"] = 1e6
    seen.add(model_identity(vllm_config))
    values["rope_theta"] = 1e4
    assert len(seen) == 8  # two ranks of one kind are not two of the other

    # What says nothing about keys and values.
    values |= {"_name_or_path": "there", "transformers_version": "6"}
    vllm_config.model_config.seed, vllm_config.model_config.max_model_len = 7, 8192
    assert model_identity(vllm_config) == identity


def test_the_longest_context_counts_where_rotary_embeddings_turn_by_it(vllm_config):
    vllm_config.model_config.hf_config.values["rope_scaling"] = {"rope_type": "longrope"}
    identity = model_identity(vllm_config)
    vllm_config.model_config.max_model_len = 131072
    assert model_identity(vllm_config) != identity


def test_a_directory_that_holds_another_model_is_another_model(vllm_config, tmp_path):
    identity = model_identity(vllm_config)
    save_file(changed(SMALL, "a", 5), tmp_path / "model" / "model.safetensors")
    assert model_identity(vllm_config) != identity


def test_dummy_weights_are_drawn_from_the_seed_and_no_file_is_read(vllm_config):
    vllm_config.load_config.load_format = "dummy"
    vllm_config.model_config.model = "/nowhere"
    identity = model_identity(vllm_config)
    vllm_config.model_config.seed = 7
    assert model_identity(vllm_config) != identity


def test_a_model_whose_files_are_not_here_is_told(vllm_config, tmp_path):
    vllm_config.model_config.model = "nobody/nothing"
    vllm_config.load_config.download_dir = str(tmp_path)  # an empty cache; nothing is downloaded
    with pytest.raises(UnknownWeights, match="the files of nobody/nothing are not found here"):
        model_identity(vllm_config)
