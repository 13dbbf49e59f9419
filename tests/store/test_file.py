"""A file gives back what was written to the bit, or is `Unusable`; nothing else can come of it."""

import hashlib
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from kvsculpt_vllm.store import file
from kvsculpt_vllm.store.file import StoredSegment, decode, encode, read_header
from kvsculpt_vllm.store.unusable import Reason, Unusable
from stored import name, same, segment

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]
STORED = segment()
DATA = encode(STORED)
HEADER_END = 8 + int.from_bytes(DATA[:8], "little")


def reason(data, **fields):
    with pytest.raises(Unusable) as error:
        decode(data, name(**fields), 0, 1)
    assert name(**fields).path(0, 1) in str(error.value)
    return error.value.reason


@settings(deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 9),
    st.dictionaries(st.text(), st.text(), max_size=3),
    st.sampled_from([bytes, bytearray, memoryview]),
)
def test_what_is_written_is_read_to_the_bit(dtype, pages, block_size, width, about, kind):
    pages[0][0] += 1
    counts = torch.tensor(pages, dtype=torch.int32)
    shape = (2, int(counts.sum()) * block_size, width * dtype.itemsize)
    keys, values = torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype)
    stored = StoredSegment(name(), 1, 3, counts, keys, values, about)
    data = encode(stored)
    assert same(decode(kind(data), name(), 1, 3), stored)
    assert read_header(data, "").about == about
    tensors = load(data)  # the library reads it, too
    assert torch.equal(tensors["pages"], counts)
    assert torch.equal(tensors["keys"].view(torch.uint8), keys.view(torch.uint8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"pages": torch.zeros(2, 2, dtype=torch.int32)},
        {"pages": torch.ones(2, 2, dtype=torch.int64)},
        {"pages": torch.full((5, 1), 1, dtype=torch.int32)},  # 24 entries on 5 pages
        {"pages": torch.tensor([[7, -1]], dtype=torch.int32)},
        {"values": STORED.values[:-1]},
        {"values": STORED.values.float()},
        {"keys": STORED.keys.double(), "values": STORED.values.double()},
        {"about": {"text": "x" * (1 << 20)}},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_tensors_that_do_not_fit_are_not_written(wrong):
    with pytest.raises(ValueError, match=r"cannot be stored|allowed|too long"):
        encode(StoredSegment(**{**vars(STORED), **wrong}))


def test_a_file_that_was_cut_off_is_told_wherever_that_was():
    assert {reason(DATA[:length]) for length in range(len(DATA))} == {Reason.CUT_OFF}


def test_a_flipped_bit_is_found_wherever_it_is():
    for at in range(len(DATA)):
        data = bytearray(DATA)
        data[at] ^= 1 << at % 8
        found = reason(data)
        if at >= HEADER_END:
            assert found == Reason.ALTERED


@settings(deadline=None, max_examples=300)
@given(st.integers(0, HEADER_END + 8), st.binary(max_size=12), st.integers(0, 12))
def test_a_header_with_anything_in_it_is_unusable(at, instead, length):
    data = DATA[:at] + instead + DATA[at + length :]
    if data != DATA:
        reason(data)


def test_more_than_was_written_is_altered():
    assert reason(DATA + b"\0") == Reason.ALTERED


@pytest.mark.parametrize("field", [{"label": "b"}, {"error": 0.1}, {"tokens": 1}, {"made": "00000000"}])
def test_a_file_with_another_files_name_is_foreign(field):
    assert reason(DATA, **field) == Reason.FOREIGN


def test_a_file_of_another_rank_is_foreign():
    with pytest.raises(Unusable, match="holds another segment"):
        decode(DATA, name(), 0, 2)


def test_a_newer_format_is_told(monkeypatch):
    monkeypatch.setattr(file, "FORMAT", 2)
    data = encode(STORED)
    monkeypatch.undo()
    assert reason(data) == Reason.NEWER


class Evil:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Evil()),
        pickle.dumps(Evil(), protocol=0) * 10,
        save({"keys": STORED.keys, "values": STORED.values, "pages": STORED.pages}),
        (1 << 63).to_bytes(8, "little") + b"{" * 100,
        b"\x89PNG\r\n\x1a\n" + bytes(1000),
        b"text " * 100,
    ],
    ids=["pickle", "pickle-0", "safetensors", "endless", "picture", "text"],
)
def test_what_is_no_file_of_ours_is_foreign(data):
    assert reason(data) == Reason.FOREIGN


def signed(change):
    """A file whose header says something else, with the checksum of that."""
    header = json.loads(DATA[8:HEADER_END])
    change(header)
    header["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    data = bytearray(len(text).to_bytes(8, "little") + text + DATA[HEADER_END:])
    digits = data.index(b'"sha256":"') + len(b'"sha256":"')
    data[digits : digits + 64] = hashlib.sha256(data).hexdigest().encode()
    return data


def test_signing_a_header_that_is_as_it_was_gives_a_usable_file():
    assert same(decode(signed(lambda header: None), name(), 0, 1), STORED)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda header: header.pop("pages"), Reason.ALTERED),
        (lambda header: header.update(more=header["keys"]), Reason.ALTERED),
        (lambda header: header["keys"].update(dtype="I32"), Reason.ALTERED),
        (lambda header: header["keys"].update(dtype=["BF16"]), Reason.ALTERED),
        (lambda header: header["keys"].update(shape=[float("inf"), 8]), Reason.ALTERED),
        (lambda header: header["keys"].update(shape=[-24, -8]), Reason.ALTERED),
        (lambda header: header["keys"].update(shape=[24 * 8]), Reason.OTHER_SHAPE),
        (lambda header: header["keys"].update(shape=[8, 24]), Reason.OTHER_SHAPE),
        (lambda header: header["keys"].update(dtype="F16"), Reason.OTHER_SHAPE),
        (lambda header: header["pages"].update(dtype="F32"), Reason.OTHER_SHAPE),
        (lambda header: header["__metadata__"].update(format="0"), Reason.FOREIGN),
        (lambda header: header["__metadata__"].update(format="one"), Reason.ALTERED),
        (lambda header: header["__metadata__"].update(about="[" * 100_000), Reason.ALTERED),
        (lambda header: header["__metadata__"].update(about="[]"), Reason.ALTERED),
    ],
)
def test_a_header_that_makes_no_sense_is_unusable_whoever_signed_it(change, expected):
    assert reason(signed(change)) == expected
