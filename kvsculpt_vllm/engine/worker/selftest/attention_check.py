"""Attention: against its twin, against a kernel of vLLM's own, and recorded once for inputs that change in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from kvsculpt_vllm.engine.worker.selftest.notes import Notes
from kvsculpt_vllm.engine.worker.selftest.rows import BARE, CHAIN, ONE, SHORT, Batch, Rows
from kvsculpt_vllm.engine.worker.selftest.subject import Subject
from kvsculpt_vllm.kernels.paged_attention import paged_attention, paged_attention_twin, parts_for

ALLOWED = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""How far an answer may be off: answers are means of entries of about 1."""

AROUND = 64
"""Tokens before and behind the output that nobody may write: a tile of a prefill."""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def _attend(rows: Rows, batch: Batch, layer: int, parts: int, out: Tensor) -> None:
    subject = rows.subject
    paged_attention(
        batch.query,
        out,
        subject.pages.kernel_pages,
        rows.directory.prefixes,
        batch.block_table,
        batch.query_start_loc,
        batch.seq_lens,
        layer,
        subject.geometry.num_heads,
        subject.scale,
        batch.max_query_len,
        parts,
    )


def _answers(rows: Rows, batch: Batch, layer: int, parts: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that gives the answers to all tokens but padding, and what stands before and behind them."""

    def call() -> tuple[Tensor, Tensor]:
        shape = (AROUND + len(batch.query) + AROUND, *batch.query.shape[1:])
        out = torch.full(shape, 7.0, dtype=batch.query.dtype, device=batch.query.device)
        _attend(rows, batch, layer, parts, out[AROUND:-AROUND])
        end = AROUND + batch.num_tokens
        # Parts of padding are merged, too, into something that nobody reads.
        behind = out[end:] if parts == 1 else out[-AROUND:]
        return out[AROUND:end], torch.cat([out[:AROUND], behind])

    return call


def _wanted(rows: Rows, batch: Batch, layer: int) -> Tensor:
    """What the twin answers to all tokens but padding."""
    subject, given = rows.subject, batch.without_padding()
    return paged_attention_twin(
        given.query,
        subject.pages.kernel_pages,
        rows.directory.prefixes,
        given.block_table,
        given.query_start_loc,
        given.seq_lens,
        layer,
        subject.geometry.num_heads,
        subject.scale,
    )


def against_twin(subject: Subject, notes: Notes) -> None:
    """Decode and prefill of rows with and without segments, in the first layer and the last, in one part and more."""
    rows = Rows(subject, _generator())
    decode = rows.batch((CHAIN, 1), (BARE, 1), (SHORT, 1), (ONE, 1))
    prefill = rows.batch((CHAIN, rows.tile + 3), (SHORT, 1), (BARE, 5))
    for layer in subject.end_layers:
        _compare(rows, notes, "decode", decode, layer, (1, 2, most_parts(subject)))
        _compare(rows, notes, "prefill", prefill, layer, (1, 2))


def _compare(rows: Rows, notes: Notes, name: str, batch: Batch, layer: int, every_parts: tuple[int, ...]) -> None:
    wanted = _wanted(rows, batch, layer)
    for parts in every_parts:
        case = f"{name}, layer {layer}, {parts} parts"
        found, around = notes.twice("paged attention", case, _answers(rows, batch, layer, parts))
        _near(rows.subject, notes, "paged attention", case, found, wanted)
        notes.same("paged attention", f"{case}, beside its answers", around, torch.full_like(around, 7.0))


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
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    rows = Rows(subject, _generator())
    batch = rows.batch((BARE, 7), (ONE, 1))
    given = batch.without_padding()
    for layer in subject.end_layers:
        keys, values = subject.views[layer].transpose(1, 2).split(subject.head_size, dim=-1)
        theirs = torch.zeros_like(given.query, memory_format=torch.contiguous_format)
        unscaled = torch.ones(len(given.seq_lens), subject.geometry.num_heads, device=subject.device)
        unified_attention(
            q=given.query,
            k=keys,
            v=values,
            out=theirs,
            cu_seqlens_q=given.query_start_loc,
            max_seqlen_q=given.max_query_len,
            seqused_k=given.seq_lens,
            max_seqlen_k=int(given.seq_lens.max()),
            softmax_scale=subject.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=given.block_table,
            softcap=0,
            q_descale=None,
            k_descale=unscaled,
            v_descale=unscaled,
        )
        found, _ = _answers(rows, batch, layer, 1)()
        _near(subject, notes, name, f"layer {layer}", found, theirs)


def in_every_number_of_parts(subject: Subject, notes: Notes) -> None:
    """Decode batches of every size for which Triton compiles anew, so that no request has to wait for that."""
    rows, layer = Rows(subject, _generator()), subject.end_layers[-1]
    decode = rows.batch((CHAIN, 1), (BARE, 1), (SHORT, 1), (ONE, 1))
    few = _wanted(rows, decode, layer)
    for tokens in sizes_in_parts(subject):
        repeated = [(CHAIN, BARE, SHORT, ONE)[number % 4] for number in range(tokens)]
        batch = rows.batch(*((row, 1) for row in repeated), padding=0)
        batch.query.copy_(decode.query[repeated])
        parts = parts_for(tokens * subject.geometry.num_heads, subject.processors)
        found, _ = _answers(rows, batch, layer, parts)()
        _near(subject, notes, "paged attention", f"{tokens} tokens, {parts} parts", found, few[repeated])


def most_parts(subject: Subject) -> int:
    """The most parts that entries are split into here, which a single token's are; three if there are fewer."""
    return max(3, parts_for(subject.geometry.num_heads, subject.processors))


def sizes_in_parts(subject: Subject) -> Iterator[int]:
    """Numbers of tokens whose decoding is split into parts, one of each kind: the kernel that merges the parts is
    compiled anew for one token, for multiples of 16 of tokens or parts, and for each next power of two of the parts.
    """
    seen, tokens = set(), 1
    while (parts := parts_for(tokens * subject.geometry.num_heads, subject.processors)) > 1:
        kind = tokens == 1, tokens % 16 == 0, parts % 16 == 0, triton.next_power_of_2(parts)
        if kind not in seen:
            seen.add(kind)
            yield tokens
        tokens += 1


def as_recorded(subject: Subject, notes: Notes) -> None:
    """A decode call as a CUDA graph replays it: directory, block table, lengths and queries change in place."""
    for parts in (1, 2):
        _record(Rows(subject, _generator()), notes, parts)


def _record(rows: Rows, notes: Notes, parts: int) -> None:
    subject, layer = rows.subject, rows.subject.end_layers[-1]
    batch = rows.batch((CHAIN, 1), (BARE, 1), (SHORT, 1))
    out = torch.zeros_like(batch.query, memory_format=torch.contiguous_format)
    replay = recorded(lambda: _attend(rows, batch, layer, parts, out), subject.device)
    replay()
    name, case = "recorded attention", f"{parts} parts"
    _near(subject, notes, name, f"{case}, as recorded", out[: batch.num_tokens], _wanted(rows, batch, layer))
    # A block that began a segment begins another one, whose heads have other numbers of pages.
    segment = int(rows.table[SHORT, 0])
    rows.publish(segment, torch.ones(subject.geometry.num_cells, dtype=torch.int64), 2)
    changed = rows.batch((BARE, 1), (CHAIN, 1), (SHORT, 1))
    changed.seq_lens[1] -= 1
    for own, new in zip(batch[:4], changed[:4], strict=True):
        own.copy_(new)
    replay()
    replayed = out[: batch.num_tokens].clone()
    eager, _ = _answers(rows, changed, layer, parts)()
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
