"""Work that goes on: what is scored of an answer is what its prompt tells."""

import importlib.util
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "long_work.py"
SPEC = importlib.util.spec_from_file_location("benchmarks_long_work", SCRIPT)
long_work = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(long_work)


def made(name, seed=0):
    """The sample's tokens, which are its characters, divided into prompt and answer; and what is scored, by line."""
    work = long_work.work(name, list, 800, 3000, seed, ["<s>"])
    assert len(work.tokens) == len(work.scored) >= work.prompt + 3000
    assert work.tokens[0] == "<s>" and 800 <= work.prompt < 840 and not work.scored[: work.prompt].any()
    prompt, answer = "".join(work.tokens[: work.prompt]), "".join(work.tokens[work.prompt :])
    kept = "".join(c if s else "_" for c, s in zip(answer, work.scored[work.prompt :], strict=True) if s or c == "\n")
    return prompt, answer.splitlines(), [line for line in kept.replace("\n", "").split("_") if line]


def test_a_list_is_copied_in_order_and_over_again():
    prompt, answer, scored = made("list")
    told = re.findall(r"^(\d+)\. ([a-z-]+): (\d+)$", prompt, re.MULTILINE)
    assert len(told) > 20
    lines = [f"{number}. {name}: {value}" for number, name, value in told]
    assert answer == [lines[i % len(lines)] for i in range(len(answer))] and len(answer) > len(lines)
    assert scored == [f" {name}: {value}" for _, name, value in (told * 5)[: len(answer)]]


def test_sums_are_of_two_things_that_the_prompt_has_and_are_right():
    prompt, answer, _ = made("sums")
    told = {name: int(value) for name, value in re.findall(r"^([a-z-]+) (\d+)$", prompt, re.MULTILINE)}
    assert len(told) > 20
    for line in answer:
        one, price, other, more, total = re.fullmatch(r"([a-z-]+) (\d+) \+ ([a-z-]+) (\d+) = (\d+)", line).groups()
        assert one != other and told[one] == int(price) and told[other] == int(more)
        assert int(price) + int(more) == int(total)
    assert len(set(answer)) > len(answer) // 2


@pytest.mark.parametrize("name", long_work.TASKS)
def test_a_seed_makes_the_same_again_and_another_one_something_else(name):
    assert made(name) == made(name) != made(name, seed=1)
