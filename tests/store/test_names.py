"""File names are the index: they say all of a segment's name, and nothing else is taken for one."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsculpt_vllm.sculpt.effort import EFFORTS
from kvsculpt_vllm.store.names import StoredName
from kvsculpt_vllm.store.places import is_partial, partial_name
from stored import name

names = st.builds(
    StoredName,
    parent=st.binary(min_size=32, max_size=32),
    key=st.binary(min_size=32, max_size=32),
    tokens=st.integers(1, 10**9 - 1),
    blocks=st.integers(1, 10**9 - 1),
    effort=st.sampled_from(list(EFFORTS)),
    error=st.floats(0, allow_infinity=False, allow_nan=False),
    made=st.text("0123456789abcdef", min_size=8, max_size=8),
)


@given(names, st.integers(0, 9), st.integers(1, 999))
def test_a_path_says_the_whole_name(given_name, rank, more):
    path = given_name.path(rank, rank + more)
    assert StoredName.parse(path) == (given_name, rank, rank + more)
    assert path.count("/") == 1
    assert len(path.partition("/")[2]) < 200  # file systems take 255, a partial file has more
    assert not is_partial(path)
    assert is_partial(partial_name(path))
    assert StoredName.parse(partial_name(path)) is None


@given(names, st.data())
def test_a_path_is_one_spelling_of_one_name(given_name, data):
    path = given_name.path(0, 2)
    at = data.draw(st.integers(0, len(path)))
    instead = data.draw(st.text("0123456789abcdefABC+-._/ \n\0é٣", max_size=3))
    other = path[:at] + instead + path[at + data.draw(st.integers(0, 3)) :]
    parsed = StoredName.parse(other)
    assert parsed is None or parsed[0].path(*parsed[1:]) == other


@pytest.mark.parametrize(
    "change",
    [
        lambda path: f"../{path}",
        lambda path: f"/{path}",
        lambda path: f"{path}\n",
        lambda path: path.replace("/", "/../"),
        lambda path: path.replace("/", "//"),
        lambda path: "../" + path.partition("/")[2],
        lambda path: path.partition("/")[2],
        lambda path: path.upper(),
        lambda path: path.replace("2048-", "02048-"),
        lambda path: path.replace("2048-", "٢٠٤٨-"),
        lambda path: path.replace("2048-", "0-"),
        lambda path: path.replace("1.230000e-02", "0.123000e-01"),
        lambda path: path.replace("1.230000e-02", "1.230000e-002"),
        lambda path: path.replace("1.230000e-02", "9.999999e+999"),
        lambda path: path.replace("1.230000e-02", "nan"),
        lambda path: path.replace("fast", "slow"),
        lambda path: path.replace(".0-of-2", ".2-of-2"),
        lambda path: path.replace(".0-of-2", ".00-of-2"),
        lambda path: path.replace(".0-of-2", ".0-of-0"),
        lambda path: path.replace("safetensors", "pickle"),
        lambda path: "",
    ],
)
def test_what_we_would_not_write_is_no_segment(change):
    path = name().path(0, 2)
    assert StoredName.parse(path) is not None
    assert change(path) != path
    assert StoredName.parse(change(path)) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"parent": b"short"},
        {"key": b""},
        {"tokens": 0},
        {"blocks": 10**9},
        {"effort": "../x"},
        {"error": math.nan},
        {"error": math.inf},
        {"error": -0.1},
        {"made": "0/0c0ffe"},
    ],
)
def test_a_name_that_no_file_can_have_is_refused(fields):
    with pytest.raises(ValueError, match=r"error is|no file name can hold"):
        name(**fields)


def test_more_effort_is_better_then_less_error():
    best = name(effort="thorough", error=0.5)
    order = [name(effort="fast", error=0.2), name(effort="fast", error=0.1), name(effort="balanced", error=0.9), best]
    assert sorted([best, *order[:-1]], key=lambda one: one.quality) == order
    assert dataclasses.replace(best, made="ffffffff").quality == best.quality
