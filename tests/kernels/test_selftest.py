"""The self-test of kernels, in Triton's interpreter: it passes, leaves nothing behind, and finds each fault it is for.

It stands here and not in tests/engine, because the interpreter is chosen for a whole process.
"""

import inspect
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
from typer.testing import CliRunner

from compilations import compilations
from kvsculpt_vllm.cli import app
from kvsculpt_vllm.engine.startup.refusals.refusal import UnsupportedFeature
from kvsculpt_vllm.engine.worker.selftest import attention_check, page_check, run, solver_check, start_up
from kvsculpt_vllm.engine.worker.selftest.notes import Measured, Notes
from kvsculpt_vllm.engine.worker.selftest.own_cache import Numbers, subject_of
from kvsculpt_vllm.engine.worker.selftest.rows import BARE, CHAIN, SHORT, Rows
from kvsculpt_vllm.engine.worker.selftest.subject import END_BLOCKS
from kvsculpt_vllm.kernels import attention_loss, attention_scores, pages
from kvsculpt_vllm.kernels import attention_plan as plan
from kvsculpt_vllm.kernels import decode_attention as decode
from kvsculpt_vllm.kernels import paged_attention as paged
from kvsculpt_vllm.kernels import prefill_attention as prefill
from kvsculpt_vllm.kernels.dispatch import VARIABLE
from kvsculpt_vllm.sculpt import objective, selection
from kvsculpt_vllm.sculpt.budgets import PagePlan
from kvsculpt_vllm.sculpt.compress import compress
from kvsculpt_vllm.sculpt.effort import Effort
from mutants import mutant

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="faults are made for the interpreter")

NUMBERS = Numbers(layers=2, query_heads=4, kv_heads=2, head_size=16, dtype=torch.float32)
MARK = 5.0


def make_subject(layout="LBHNC", **numbers):
    return subject_of(replace(NUMBERS, **numbers), 16, layout, torch.device("cpu"))


def middle(subject):
    """The blocks that hold something of somebody else's."""
    return torch.stack([view[END_BLOCKS:-END_BLOCKS] for view in subject.views])


def made(name, **numbers):
    """The kernels that one check finds at fault."""
    notes = Notes(again=False)
    with torch.inference_mode(), run._kernels_chosen():
        # With one KV head, and with two in the `tested` one: the interpreter takes as long as there are heads.
        run.CHECKS[name](make_subject(query_heads=2, kv_heads=1, **numbers), notes)
    assert notes.measured
    return {each.kernel for each in notes.measured if not each.good}


class Found(Exception):
    """A kernel is at fault: the rest of a check need not be interpreted."""


class UntilFound(Notes):
    """Comparisons up to the first bad one."""

    def write(self, kernel, case, error, allowed=0.0):
        super().write(kernel, case, error, allowed)
        if not self.measured[-1].good:
            raise Found(kernel)


def first_found(name, **numbers):
    """The first kernel that one check finds at fault."""
    with torch.inference_mode(), run._kernels_chosen(), pytest.raises(Found) as found:
        run.CHECKS[name](make_subject(query_heads=2, kv_heads=1, **numbers), UntilFound(again=False))
    return str(found.value)


@pytest.fixture(scope="module")
def tested():
    """A whole self-test: its report, its subject, and what Triton would have compiled."""
    subject = make_subject("BLHNC")
    middle_views = [view[END_BLOCKS:-END_BLOCKS] for view in subject.views]
    for view in middle_views:
        view.fill_(MARK)
    with compilations() as compiled:
        return run.self_test(subject), subject, compiled


def test_everything_agrees_here_with_vllms_kernel_too(tested):
    report, _, _ = tested
    assert not report.failures and not report.left_out
    assert {"store", "scatter", "gather", "paged attention", "recorded attention", "loss", "gradient"} <= {
        *report.worst()
    }
    assert "paged attention and vLLM's unified attention" in report.worst()


def test_what_it_wrote_is_gone_and_the_rest_was_not_touched(tested):
    _, subject, _ = tested
    assert not subject.holds_something()
    assert bool((middle(subject) == MARK).all())


def test_no_kernel_is_compiled_after_it(tested, monkeypatch):
    """What serving and solving launch are kernels that the self-test has launched, for Triton's launcher."""
    _, subject, before = tested
    monkeypatch.setenv(VARIABLE, "triton")
    with torch.inference_mode(), compilations() as after:
        for method, budget, sinks in [
            ("sculpt", "adaptive", 3),
            ("select_fit", "uniform", 0),
            ("select", "adaptive", 0),
        ]:
            size = solver_check.Size(203 if sinks else 240, 8 * 16 - sinks, 0)
            problems = solver_check.make_problems(subject, size, torch.Generator().manual_seed(5))
            effort = Effort(positions=size.queries, pilot_positions=70, fit_positions=size.queries - 30, key_steps=5)
            compress(problems, PagePlan(16, 8, 2 * 5, sinks), method, budget, effort)
        rows = Rows(subject, torch.Generator().manual_seed(6))
        for number in (1, 2, 3, 5, 16):  # decoding, of which one token alone comes up most
            batch = rows.batch(*[(CHAIN, 1)] * number, padding=0)
            tokens = len(batch.query)
            attention_check._answers(rows, batch, 0, attention_check.most_chunks(subject))()
            some = subject.normal(tokens, 2, 16, generator=torch.Generator())
            pages.store(subject.pages.kernel_pages, 1, torch.full((tokens,), -1), some, some)
        for picked in ([(SHORT, 1), (BARE, 4)], [(CHAIN, 9), (BARE, 20)]):  # prefill
            batch = rows.batch(*picked)
            attention_check._answers(rows, batch, 1, attention_check.most_chunks(subject))()
        index = torch.arange(9)
        for first in (0, 1, 2, 3):  # the pages of a head among a segment's
            subject.pages.write(index[first:], *subject.pages.read(index[first:]))
    subject.clear()
    assert after and after <= before, sorted(after - before)


DECODE = {
    "the last blocks": ("block * block_stride", "tl.minimum(block, 25) * block_stride"),
    "the layer": ("own_cell = layer * num_kv_heads + h", "own_cell = h"),
    "where the next segment begins": ("column += tl.load(span_blocks + slot).to(tl.int32)", "column += 1"),
    "a chunk that ends too early": ("end_entry = first_entry + chunk", "end_entry = first_entry + chunk - 1"),
    "a chunk's first piece": ("before += tl.sum(tl.where(passed, entries, 0), 0)", "before += 0"),
    "the peak of earlier entries": ("mass = mass * shrink + tl.sum(w, 1)", "mass = mass + tl.sum(w, 1)"),
    "parts that are not rescaled": ("tl.exp2(z - higher)", "tl.where(there, 1.0, 0.0)"),
    "padding": ("zeros = tl.zeros(", "zeros = 1.0 + tl.zeros("),
}
PREFILL = {
    "a mask that is off by one": ("shift + token, packed)", "shift + token + 1, packed)"),
    "a tile that sees too little": ("tl.minimum(begin + block_t, end_token)", "tl.minimum(begin + 1, end_token)"),
    "a tile that runs into the next row": ("(token < end_token)", "(token < end_token + 1)"),
}
PLAN = {
    "parts that overwrite one another": ("tl.where(split, part + number, -1)", "tl.where(split, part, -1)"),
    "half a chunk that nobody takes": ("counts + layer * 3 + 1, chunk)", "counts + layer * 3 + 1, chunk // 2)"),
    "a segment that is not counted": ("packed - column) * block_size", "packed - column - 1) * block_size"),
}


@pytest.mark.parametrize("fault", DECODE)
def test_a_fault_of_decoding_is_found(fault, monkeypatch, tmp_path):
    monkeypatch.setattr(paged, "decode_attention", mutant(decode, tmp_path, DECODE[fault]).decode_attention)
    assert first_found("attention") == "paged attention"


@pytest.mark.parametrize("fault", PREFILL)
def test_a_fault_of_prefill_is_found(fault, monkeypatch, tmp_path):
    monkeypatch.setattr(paged, "prefill_attention", mutant(prefill, tmp_path, PREFILL[fault]).prefill_attention)
    assert first_found("attention") == "paged attention"


@pytest.mark.parametrize("fault", PLAN)
def test_a_fault_of_the_plan_is_found(fault, monkeypatch, tmp_path):
    monkeypatch.setattr(attention_check, "plan_attention", mutant(plan, tmp_path, PLAN[fault]).plan_attention)
    assert first_found("attention") == "paged attention"


SOFTMAX = {"soft_cap": 2.0, "has_sinks": True}


def test_caps_and_learned_sinks_are_tested_where_the_model_has_them():
    for name in ("attention", "attention of vLLM", "scores", "losses", "values", "compression"):
        assert made(name, **SOFTMAX) == set(), name


def test_a_sink_of_another_head_is_found(monkeypatch, tmp_path):
    fault = ("tl.load(sinks + heads,", "tl.load(sinks + heads * 0,")
    monkeypatch.setattr(paged, "decode_attention", mutant(decode, tmp_path, fault).decode_attention)
    assert first_found("attention", **SOFTMAX) == "paged attention"


@pytest.mark.parametrize("name", ["attention", "scores", "losses"])
def test_a_cap_that_is_left_out_is_found(name, monkeypatch):
    def loss(*arguments, **named):
        given = inspect.signature(attention_loss.attention_loss).bind(*arguments, **named)
        given.arguments["soft_cap"] = None
        return attention_loss.attention_loss(*given.args, **given.kwargs)

    def uncapped(*arguments):
        paged.paged_attention(*arguments[:-1], 0.0)

    monkeypatch.setattr(attention_check, "paged_attention", uncapped)
    monkeypatch.setattr(
        selection, "attention_with_lse", lambda q, k, v, cap: attention_scores.attention_with_lse(q, k, v)
    )
    monkeypatch.setattr(objective, "attention_loss", loss)
    assert first_found(name, **SOFTMAX)


def test_a_fault_that_kernel_and_twin_share_is_found_by_vllms_kernel(monkeypatch, tmp_path):
    twin = mutant(paged, tmp_path, (" > length - (last - t)", " > length - (last - t) + 1"))
    last = ("tl.minimum(begin + block_t, end_token)", "tl.minimum(begin + block_t + 1, end_token)")
    broken = mutant(prefill, tmp_path, PREFILL["a mask that is off by one"], last)
    monkeypatch.setattr(paged, "prefill_attention", broken.prefill_attention)
    monkeypatch.setattr(attention_check, "paged_attention_twin", twin.paged_attention_twin)
    assert made("attention") == set()
    assert first_found("attention of vLLM") == "paged attention and vLLM's unified attention"


@pytest.mark.parametrize("which", ["query", "prefixes", "block_table", "seq_lens", "plan"])
def test_what_a_recorded_call_has_read_too_early_is_found(which, monkeypatch):
    recorded = {}

    def as_first_seen(argument):
        if isinstance(argument, plan.Prefixes) and which == "prefixes":
            copy = type(argument)(*(tensor.clone() for tensor in argument))
            return recorded.setdefault(argument.starts.data_ptr(), copy)
        if isinstance(argument, plan.BatchRows) and hasattr(argument, which):
            tensor = getattr(argument, which)
            return argument._replace(**{which: recorded.setdefault(tensor.data_ptr(), tensor.clone())})
        if isinstance(argument, torch.Tensor) and which == "query":
            return recorded.setdefault(argument.data_ptr(), argument.clone())
        return argument

    def attend(query, out, *rest):
        paged.paged_attention(as_first_seen(query), out, *map(as_first_seen, rest))

    def planned(pages, prefixes, rows, most):
        if which == "plan":
            key = rows.block_table.data_ptr(), most
            return recorded.setdefault(key, plan.plan_attention(pages, prefixes, rows, most))
        return plan.plan_attention(pages, *map(as_first_seen, (prefixes, rows)), most)

    monkeypatch.setattr(attention_check, "paged_attention", attend)
    monkeypatch.setattr(attention_check, "plan_attention", planned)
    assert first_found("recorded attention") == "recorded attention"


COPIES = {
    "store": {
        "the last block": ("slot // block_size * block_stride", "tl.minimum(slot // block_size, 30) * block_stride"),
        "padding": (
            "there = (slot >= 0) & (h < num_heads)",
            "slot = tl.where(t < tokens, tl.maximum(slot, 0), slot)\n    there = (slot >= 0) & (h < num_heads)",
        ),
        "the layer": ("cell_pages + layer * num_heads + h", "cell_pages + h"),
        "values": ("tl.store(buffer + at + value_offset, v", "tl.store(buffer + at + value_offset, k"),
    },
    "gather": {"the last entry": ("(e[:, None] < block_size)", "(e[:, None] < block_size - 1)")},
    "scatter": {
        "values": (
            "tl.store(there + value_offset, tl.load(values + here",
            "tl.store(there + value_offset, tl.load(keys + here",
        )
    },
}


@pytest.mark.parametrize(
    ("kernel", "fault"), [(kernel, fault) for kernel, faults in COPIES.items() for fault in faults]
)
def test_a_fault_of_a_page_copy_is_found(kernel, fault, monkeypatch, tmp_path):
    broken = getattr(mutant(pages, tmp_path, COPIES[kernel][fault]), kernel)
    monkeypatch.setattr(page_check if kernel == "store" else pages, kernel, broken)
    assert first_found("page copies") == kernel


LOSSES = {
    "no shift": (("attend_tile(\n        q, z,", "attend_tile(\n        q, z * 0.0,"), {"loss", "gradient"}),
    "half a gradient": (
        ('tl.trans(v), input_precision="tf32") + c[:, None]', 'tl.trans(v), input_precision="tf32")'),
        {"gradient"},
    ),
    "padding that is not zero": (
        ("grad = torch.zeros_like(", "grad = torch.ones_like("),
        {"gradient", "gradient of padding"},
    ),
}


@pytest.mark.parametrize("fault", LOSSES)
def test_a_fault_of_the_loss_is_found(fault, monkeypatch, tmp_path):
    change, found = LOSSES[fault]
    monkeypatch.setattr(objective, "attention_loss", mutant(attention_loss, tmp_path, change).attention_loss)
    assert made("losses") == found


def test_a_fault_of_the_scores_is_found(monkeypatch, tmp_path):
    broken = mutant(attention_scores, tmp_path, ("tl.exp(logits * power)", "tl.exp(logits)"))
    monkeypatch.setattr(selection, "received", broken.received)
    assert first_found("scores") == "attention that entries receive"
    broken = mutant(attention_scores, tmp_path, ("mass = mass * shrink + tl.sum(w, 1)", "mass = mass + tl.sum(w, 1)"))
    monkeypatch.setattr(selection, "attention_with_lse", broken.attention_with_lse)
    assert {"attention of the full cache", "its log-sum-exp"} <= made("scores")


def test_normal_equations_without_their_ridge_are_found(monkeypatch):
    stock = solver_check.fit_values
    monkeypatch.setattr(
        solver_check,
        "fit_values",
        lambda target, keys, start, ridge, valid: stock(target, keys, start, 0 * ridge, valid),
    )
    assert made("values") == {"values by ridge least squares"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cholesky_ex", {"Cholesky", "Cholesky's solution", "triangular solution"}),
        ("solve_triangular", {"Cholesky's solution", "triangular solution"}),
        ("solve", {"general solution"}),
    ],
)
def test_a_library_that_solves_something_else_is_found(name, found, monkeypatch):
    stock = getattr(torch.linalg, name)

    def off(matrix, *rest, **kwargs):
        if matrix.dtype == torch.float64:  # what it is compared with
            return stock(matrix, *rest, **kwargs)
        return stock(matrix * 1.02, *rest, **kwargs)

    monkeypatch.setattr(torch.linalg, name, off)
    assert made("linear systems") == found


@pytest.mark.parametrize(
    ("claim", "found"),
    [
        (
            lambda done: {"error": 1.2 * done.start_error},
            {"compression, error above its start", "compression, held-out error"},
        ),
        (lambda done: {"error": 0.9 * done.error}, {"compression, held-out error"}),
        (lambda done: {"keys": [key.roll(1, 1) for key in done.keys]}, {"compression, held-out error"}),
    ],
)
def test_a_compression_that_is_not_what_it_says_is_found(claim, found, monkeypatch):
    stock = solver_check.compress

    def flattering(*arguments):
        done = stock(*arguments)
        return replace(done, **claim(done))

    monkeypatch.setattr(solver_check, "compress", flattering)
    assert made("compression") == found


def test_programs_that_race_are_found():
    rounds = iter(range(2))
    notes = Notes()
    (first,) = notes.twice("kernel", "case", lambda: (torch.tensor([1.0, 2.0 + 1e-6 * next(rounds)]),))
    assert first.tolist() == [1.0, 2.0]
    assert notes.measured == [Measured("kernel", "case, once more", 1.0, 0.0)]


def test_what_is_not_a_number_is_never_near():
    notes, wanted = Notes(), torch.ones(2)
    notes.near("kernel", "case", torch.tensor([1.0, torch.nan]), wanted, 1e9)
    notes.same("kernel", "case", torch.full((2,), torch.nan), torch.full((2,), torch.nan))
    assert not any(each.good for each in notes.measured)


def test_a_cache_that_holds_something_is_left_as_it_is():
    subject = make_subject()
    subject.views[1][-1, 0, 3, 4] = MARK
    report = run.self_test(subject)
    assert "hold something" in report.failure
    assert float(subject.views[1].sum()) == MARK


def test_every_rank_refuses_with_the_words_of_the_one_that_failed(monkeypatch):
    def failing(subject, notes):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(run, "CHECKS", {"attention": failing})
    ranks = SimpleNamespace(count=2, number=1, is_first=False)
    told = []
    ranks.gather = lambda words: told.append(words) or [["", words]]
    with pytest.raises(
        UnsupportedFeature, match=r"this device: its self-test failed: rank 1: attention: off by inf"
    ) as own:
        start_up.test_at_start_up(make_subject(), ranks)
    for fact in ("RuntimeError: no such instruction", "head size 16", "torch 2", "triton 3", "vllm 0.32", "device cpu"):
        assert fact in str(own.value)
    monkeypatch.setattr(run, "CHECKS", {})
    ranks.gather = lambda words: [[words], told]  # this rank's passed
    with pytest.raises(UnsupportedFeature) as others:
        start_up.test_at_start_up(make_subject(), ranks)
    assert str(others.value) == str(own.value)
    ranks.gather = lambda words: [[words]]
    assert start_up.test_at_start_up(make_subject(), ranks).measured == []


SMALL = ["--layers", "2", "--heads", "4", "--kv-heads", "2", "--head-size", "16", "--dtype", "float32"]


def selftest(*arguments):
    return CliRunner().invoke(app, ["selftest", *arguments])


def test_the_command_tells_programs_and_people(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "CHECKS", {"page copies": page_check.check, "linear systems": solver_check.systems})
    result = selftest(*SMALL, "--layout", "BLHNC", "--json")
    told = json.loads(result.output)
    assert result.exit_code == 0 and told["passed"]
    assert told["machine"]["kernels"] == "interpreted"
    assert told["subject"] | {"layers": 2, "query_heads": 4, "block_stride": 4} == told["subject"]
    broken = mutant(pages, tmp_path, COPIES["store"]["the last block"])
    monkeypatch.setattr(page_check, "store", broken.store)
    result = selftest(*SMALL)
    assert result.exit_code == 1
    assert "BAD store: off by" in result.output and "ok  gather: off by 0" in result.output
    assert "on: device cpu, kernels interpreted, torch" in result.output


def test_the_command_tests_a_cache_in_fp8(monkeypatch):
    checks = {"page copies": page_check.check, "attention": attention_check.against_twin}
    monkeypatch.setattr(run, "CHECKS", checks | {"recorded": attention_check.as_recorded})
    told = json.loads(selftest(*SMALL, "--fp8", "--json").output)
    compared = {each["kernel"] for each in told["measured"]}
    assert told["passed"] and {"store", "gather", "scatter", "paged attention", "recorded attention"} <= compared
    assert (told["subject"]["dtype"], told["subject"]["cache"]) == ("float32", "float8_e4m3fn")


def test_the_command_takes_a_models_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHECKS", {})
    config = {"num_hidden_layers": 3, "num_attention_heads": 6, "hidden_size": 96, "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config | {"num_key_value_heads": 2}}))
    told = json.loads(selftest("--model", str(tmp_path), "--kv-heads", "3", "--json").output)["subject"]
    wanted = {"layers": 3, "query_heads": 6, "kv_heads": 3, "head_size": 16, "dtype": "float16"}
    assert told | wanted == told
    (tmp_path / "config.json").write_text("{}")
    result = selftest("--model", str(tmp_path))
    assert result.exit_code == 2 and "num_attention_heads" in result.output


def test_the_command_says_that_there_is_nothing_to_test(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    result = selftest()
    assert result.exit_code == 2
    assert "there is nothing to test: no CUDA device is here" in result.output
