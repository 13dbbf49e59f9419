"""Attention: against its twin, against a kernel of vLLM's own, and recorded once for inputs that change in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from kvsculpt_vllm.engine.worker.selftest.notes import Notes
from kvsculpt_vllm.engine.worker.selftest.rows import BARE, CHAIN, ONE, SHORT, Batch, Rows
from kvsculpt_vllm.engine.worker.selftest.subject import Subject
from kvsculpt_vllm.kernels.attention_plan import CHUNKS_PER_PROCESSOR, plan_attention
from kvsculpt_vllm.kernels.paged_attention import paged_attention, paged_attention_twin

ALLOWED = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""How far an answer may be off: answers are means of entries of about 1."""

IN_TF32 = 1e-2
"""The same beside vLLM's kernel in float32, which a GPU multiplies in TF32 there (seen on an H100: 2e-3)."""

AROUND = 64
"""Tokens before and behind the output that nobody may write: a tile of a prefill."""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def _attend(rows: Rows, batch: Batch, layer: int, chunks: int, out: Tensor) -> None:
    subject = rows.subject
    pages, prefixes = subject.pages.kernel_pages, rows.directory.prefixes
    plan = plan_attention(pages, prefixes, batch.rows, chunks)
    heads, scale = subject.geometry.num_heads, subject.scale
    softmax = subject.sink_logits, subject.soft_cap or 0.0
    paged_attention(batch.query, out, pages, prefixes, batch.rows, plan, layer, heads, scale, *softmax)


def _answers(rows: Rows, batch: Batch, layer: int, chunks: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that gives the answers to all tokens but padding, and what stands around them: 7 where nobody may write,
    and 7 more than the answers to padding.
    """

    def call() -> tuple[Tensor, Tensor]:
        shape = (AROUND + len(batch.query) + AROUND, *batch.query.shape[1:])
        out = torch.full(shape, 7.0, dtype=batch.query.dtype, device=batch.query.device)
        _attend(rows, batch, layer, chunks, out[AROUND:-AROUND])
        end = AROUND + batch.num_tokens
        return out[AROUND:end], torch.cat([out[:AROUND], out[end:-AROUND] + 7.0, out[-AROUND:]])

    return call


def _wanted(rows: Rows, batch: Batch, layer: int) -> Tensor:
    """What the twin answers to all tokens but padding."""
    subject, (query, table, begins, lengths) = rows.subject, batch.without_padding()
    pages, prefixes = subject.pages.kernel_pages, rows.directory.prefixes
    heads, scale = subject.geometry.num_heads, subject.scale
    softmax = subject.sink_logits, subject.soft_cap or 0.0
    return paged_attention_twin(query, pages, prefixes, table, begins, lengths, layer, heads, scale, *softmax)


def against_twin(subject: Subject, notes: Notes) -> None:
    """Decode and prefill of rows with and without segments, in the first layer and the last, in one chunk and more."""
    rows = Rows(subject, _generator())
    decode = rows.batch((CHAIN, 1), (BARE, 1), (SHORT, 1), (ONE, 1))
    prefill = rows.batch((CHAIN, rows.tile + 3), (BARE, 5), (SHORT, 1))
    for layer in subject.end_layers:
        _compare(rows, notes, "decode", decode, layer, (1, most_chunks(subject)))
        _compare(rows, notes, "prefill", prefill, layer, (most_chunks(subject),))


def _compare(rows: Rows, notes: Notes, name: str, batch: Batch, layer: int, every_number: tuple[int, ...]) -> None:
    wanted = _wanted(rows, batch, layer)
    for chunks in every_number:
        case = f"{name}, layer {layer}, {chunks} full chunks"
        found, around = notes.twice("paged attention", case, _answers(rows, batch, layer, chunks))
        _near(rows.subject, notes, "paged attention", case, found, wanted)
        notes.same("paged attention", f"{case}, beside its answers", around, torch.full_like(around, 7.0))


def most_chunks(subject: Subject) -> int:
    """Full chunks that a layer's entries are cut into on this device, at most: rows as short as these are cut into the
    smallest ones.
    """
    return CHUNKS_PER_PROCESSOR * subject.processors


def _near(subject: Subject, notes: Notes, kernel: str, case: str, found: Tensor, wanted: Tensor) -> None:
    notes.near(kernel, case, found, wanted, ALLOWED[subject.dtype], share=False)


def against_vllm(subject: Subject, notes: Notes) -> None:
    """Rows without a segment, as vLLM's own Triton kernel answers them: it shares no code with our twin."""
    from vllm.triton_utils import HAS_TRITON

    name = "paged attention and vLLM's unified attention"
    if not HAS_TRITON:
        notes.leave_out(f"{name}: vLLM finds no Triton here")
        return
    if triton.knobs.runtime.interpret and subject.dtype == torch.bfloat16:
        notes.leave_out(f"{name}: Triton's interpreter cannot multiply bfloat16")
        return
    if subject.cache_dtype != subject.dtype:
        notes.leave_out(f"{name}: they round queries differently where the cache holds FP8")
        return
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    in_tf32 = subject.dtype == torch.float32 and not triton.knobs.runtime.interpret
    allowed = IN_TF32 if in_tf32 else ALLOWED[subject.dtype]
    rows = Rows(subject, _generator())
    batch = rows.batch((BARE, 7), (ONE, 1))
    query, block_table, begins, lengths = batch.without_padding()
    for layer in subject.end_layers:
        keys, values = subject.views[layer].transpose(1, 2).split(subject.head_size, dim=-1)
        theirs = torch.zeros_like(query, memory_format=torch.contiguous_format)
        unscaled = torch.ones(len(lengths), subject.geometry.num_heads, device=subject.device)
        unified_attention(
            q=query,
            k=keys,
            v=values,
            out=theirs,
            cu_seqlens_q=begins,
            max_seqlen_q=7,
            seqused_k=lengths,
            max_seqlen_k=int(lengths.max()),
            softmax_scale=subject.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=block_table,
            softcap=subject.soft_cap or 0,
            q_descale=None,
            k_descale=unscaled,
            v_descale=unscaled,
            sinks=subject.sink_logits,
        )
        found, _ = _answers(rows, batch, layer, most_chunks(subject))()
        notes.near(name, f"layer {layer}", found, theirs, allowed, share=False)


def as_recorded(subject: Subject, notes: Notes) -> None:
    """A decode call as a CUDA graph replays it: directory, block table, lengths and queries change in place."""
    for chunks in (1, most_chunks(subject)):
        _record(Rows(subject, _generator()), notes, chunks)


def _record(rows: Rows, notes: Notes, chunks: int) -> None:
    subject, layer = rows.subject, rows.subject.end_layers[-1]
    batch = rows.batch((CHAIN, 1), (BARE, 1), (SHORT, 1))
    out = torch.zeros_like(batch.query, memory_format=torch.contiguous_format)
    replay = recorded(lambda: _attend(rows, batch, layer, chunks, out), subject.device)
    replay()
    name, case = "recorded attention", f"{chunks} full chunks"
    _near(subject, notes, name, f"{case}, as recorded", out[: batch.num_tokens], _wanted(rows, batch, layer))
    # A block that began a segment begins another one, whose heads have other numbers of pages.
    segment = int(rows.table[SHORT, 0])
    rows.publish(segment, torch.ones(subject.geometry.num_cells, dtype=torch.int64), 2)
    changed = rows.batch((BARE, 1), (CHAIN, 1), (SHORT, 1))
    changed.rows.seq_lens[1] -= 1
    batch.query.copy_(changed.query)
    for own, new in zip(batch.rows[:3], changed.rows[:3], strict=True):
        own.copy_(new)
    replay()
    replayed = out[: batch.num_tokens].clone()
    eager, _ = _answers(rows, changed, layer, chunks)()
    notes.same(name, f"{case}, changed in place", replayed, eager)
    _near(subject, notes, name, f"{case}, changed in place", replayed, _wanted(rows, changed, layer))


def recorded(call: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Make of `call` one that can be run again without its Python: a CUDA graph. Elsewhere it is the call itself."""
    if device.type != "cuda":
        return call
    call()  # what it needs is compiled and loaded by now, which cannot be recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
