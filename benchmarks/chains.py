"""What a chain loses as it grows, and as it is read from afar: `python benchmarks/chains.py --help`.

Questions that one context and what follows it do not answer. Part `answers`: a text goes on behind a prompt as a
long answer would, and becomes a segment whenever it has grown by `--decode` tokens, as the engine has it; KL against
the full cache by the number of segments that the answer has come to. Every token is the text's own (teacher-forced), so
that one early difference does not decide all that follows. Part `afar`: a segment, then tokens of another text, which
stay exact, then what really follows the segment; KL by how many tokens lie between. Part `work`: the right answer to a
task that goes on for as long (`long_work.py`): the share of its tokens, of those that the prompt tells, that the model
finds the most likely, by the number of segments as well, from both caches.

Prints a table of each, draws them, and ends with one JSON line.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from kvsculpt_vllm.config import CompressionConfig
from kvsculpt_vllm.engine.shared.spans import next_span
from kvsculpt_vllm.evaluation.attention import RaggedCache
from kvsculpt_vllm.evaluation.chain import Chain
from kvsculpt_vllm.evaluation.methods.base import Method, surveyed
from kvsculpt_vllm.evaluation.metrics import TokenScores, compare
from kvsculpt_vllm.evaluation.model import EvaluationModel, load_tokenizer, model_directory
from kvsculpt_vllm.evaluation.run import calibration_of
from kvsculpt_vllm.evaluation.texts import passages, read_text
from kvsculpt_vllm.sculpt.budgets import blocks_kept
from kvsculpt_vllm.sculpt.chain import Piece, pieces
from kvsculpt_vllm.sculpt.effort import EFFORTS, Effort
from long_work import TASKS, Work, work

BLOCK_SIZE, FOLLOWING = 32, 256
BETWEEN = (0, 1024, 4096)
PARTS = ("answers", "afar", "work")
WINDOW, SINKS, MIN_TOKENS = CompressionConfig().window, CompressionConfig().sink, CompressionConfig().min_tokens

console = Console(stderr=True)


class Setup(NamedTuple):
    """What all contexts share."""

    model: EvaluationModel
    method: Method
    effort: Effort
    config: CompressionConfig

    def chain(self, tokens: Sequence[int]) -> Chain:
        """A chain of nothing yet."""
        return Chain(self.model, tokens, self.effort, BLOCK_SIZE, WINDOW, SINKS)


class Stretch(NamedTuple):
    """What the model expects between two segments of an answer."""

    made: int  # segments of the answer, so far
    first: int  # the first token that is expected is this one
    expected: Tensor  # logits (T, vocabulary) from the chain
    exact: Tensor  # the same from the full cache


def answered(setup: Setup, tokens: Sequence[int], prompt: int) -> Iterator[Stretch]:
    """Go through the tokens behind a prompt of `prompt` of them, a stretch between two segments at a time."""
    chain, model, config = setup.chain(tokens), setup.model, setup.config
    blocks = packed = made = 0
    for piece in pieces(prompt, WINDOW, BLOCK_SIZE, config.keep_ratio, config.segment_tokens):
        chain.add(piece, setup.method, "adaptive")
        blocks, packed = piece.end, packed + piece.packed_blocks
    exact = model.record(tokens, torch.tensor([0]))
    at, last = prompt, len(tokens) - 1  # nothing says what follows the last token
    while at < last:
        # The tail that the engine waits for: see spans.next_span.
        grown = max(config.decode, min(MIN_TOKENS, config.segment_tokens))
        end = min(max(at + 1, blocks * BLOCK_SIZE + grown + WINDOW), last)
        chain.compute(at)
        full = RaggedCache(list(exact.keys[:, :at]), list(exact.values[:, :at]), model.storage)
        logits, exact_logits = (model.continue_from(cache, tokens[at:end], at) for cache in (chain.cache, full))
        yield Stretch(made, at + 1, logits, exact_logits)
        at = end
        span = next_span(config, end, BLOCK_SIZE, blocks, packed, prompt)
        if at < last and span is not None:
            chain.add(Piece(span.first, span.blocks, span.packed_blocks, span.followed), setup.method, "adaptive")
            blocks, packed, made = span.end, packed + span.packed_blocks, made + 1


def scored(setup: Setup, tokens: Sequence[int], prompt: int) -> Iterator[tuple[int, TokenScores]]:
    """Score the stretches of an answer, and say how many segments there were."""
    for made, first, expected, exact in answered(setup, tokens, prompt):
        yield made, compare(exact, expected, tokens[first : first + len(expected)])


def right(setup: Setup, task: Work) -> Iterator[tuple[int, np.ndarray]]:
    """Say of the tokens of an answer that count (n, 2) bool, of one stretch after the other, whether they are found the
    most likely ones: by the chain, and by the full cache.
    """
    for made, first, expected, exact in answered(setup, task.tokens, task.prompt):
        here = slice(first, first + len(expected))
        wanted = torch.tensor(task.tokens[here])
        found = torch.stack([logits.argmax(-1) == wanted for logits in (expected, exact)], dim=1)
        yield made, found.numpy()[task.scored[here]]


def read_from_afar(
    setup: Setup, context: Sequence[int], other: Sequence[int], continuation: Sequence[int]
) -> TokenScores:
    """Score what follows a context that is a segment, behind tokens of another text."""
    # All but the window, which is the beginning of the other text if there is one.
    tokens = [*context, *other]
    blocks = (len(tokens) - WINDOW if not other else len(context)) // BLOCK_SIZE
    piece = Piece(0, blocks, blocks_kept(setup.config.keep_ratio, blocks), followed=bool(other))
    made = setup.chain(tokens).make([piece], setup.method, "adaptive")
    exact = setup.model.record(tokens, torch.tensor([0]))
    full = RaggedCache(list(exact.keys), list(exact.values), setup.model.storage)
    asked, following = continuation[:-1], continuation[1:]
    logits, exact_logits = (setup.model.continue_from(cache, asked, len(tokens)) for cache in (made.cache, full))
    return compare(exact_logits, logits, following)


def told(scores: Sequence[TokenScores]) -> dict[str, Any]:
    """The numbers of one line."""
    kl = np.concatenate([score.kl for score in scores])
    agree = np.concatenate([score.agree for score in scores])
    return {
        "tokens": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1_agreement": float(agree.mean()),
    }


def shown(title: str, first: str, rows: dict[int, dict[str, Any]]) -> None:
    """Print the lines of a part."""
    table = Table(first, "tokens", "KL, mean", "median", "99 %", "same first choice", title=title)
    for key, row in rows.items():
        numbers = (f"{row[name]:.5f}" for name in ("kl_mean", "kl_median", "kl_p99"))
        table.add_row(f"{key:,}", f"{row['tokens']:,}", *numbers, f"{row['top1_agreement']:.3f}")
    Console(width=110).print(table)


def accuracy(parts: Sequence[np.ndarray]) -> dict[str, Any]:
    """The numbers of one line of the part `work`."""
    every = np.concatenate(parts)
    ours, full = every.mean(0).tolist()
    return {
        "tokens": len(every),
        "right": ours,
        "right_full": full,
        "differ": float((every[:, 0] != every[:, 1]).mean()),
    }


def shown_work(title: str, rows: dict[int, dict[str, Any]]) -> None:
    """Print the lines of a task."""
    table = Table("segments of the answer", "tokens", "right", "full cache", "one of them alone", title=title)
    for made, row in rows.items():
        shares = (f"{row[name]:.3f}" for name in ("right", "right_full", "differ"))
        table.add_row(str(made), f"{row['tokens']:,}", *shares)
    Console(width=110).print(table)


def draw(parts: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Draw KL, mean and median, of each part."""
    import matplotlib

    matplotlib.use("Agg")  # no display where this runs
    import matplotlib.pyplot as plt

    labels = {"answers": "segments that the answer has come to", "afar": "other tokens behind the segment"}
    figure, panels = plt.subplots(1, len(parts), figsize=(5.5 * len(parts), 4), layout="constrained", squeeze=False)
    for axes, (name, rows) in zip(panels[0], parts.items(), strict=True):
        for number, form in (("kl_mean", "o-"), ("kl_median", "s--")):
            axes.plot(list(rows), [row[number] for row in rows.values()], form, label=number[3:])
        axes.set(xlabel=labels[name], ylabel="KL, nats", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    model: Annotated[str, typer.Option(help="A directory, or a model of `kvsculpt model`.")] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="A UTF-8 file, or pydoc, stdlib.")] = "pydoc",
    other: Annotated[str, typer.Option(help="The text that lies between, of the part afar.")] = "stdlib",
    parts: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(PARTS)}.")] = ",".join(PARTS),
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of the text, spread evenly.")] = 3,
    prompt: Annotated[int, typer.Option(min=512, help="Tokens of a prompt, and of the segment.")] = 2048,
    answer: Annotated[int, typer.Option(min=64, help="Tokens of an answer.")] = 4000,
    decode: Annotated[int, typer.Option(help="See --kv-compression-decode.")] = CompressionConfig().decode,
    decode_keep_ratio: Annotated[float, typer.Option(help="See --kv-compression-decode-keep-ratio.")] = 0.0,
    segment: Annotated[int | None, typer.Option(help="See --kv-compression-segment, whose default it has.")] = None,
    keep_ratio: Annotated[float, typer.Option(help="Fraction of the entries that is kept.")] = 0.3,
    effort: Annotated[str, typer.Option(help="fast, balanced or thorough.")] = "balanced",
    json_path: Annotated[Path | None, typer.Option("--json", help="A file for the JSON line, too.")] = None,
    png: Annotated[Path | None, typer.Option(help="The picture of answers and afar.")] = None,
) -> None:
    """Measure chains that grow while an answer is written, and segments that are read from afar."""
    chosen = parts.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        raise typer.BadParameter(f"got {', '.join(unknown)}, allowed: {', '.join(PARTS)}", param_hint="--parts")
    if effort not in EFFORTS:
        raise typer.BadParameter(f"got {effort}, allowed: {', '.join(EFFORTS)}", param_hint="--effort")
    directory = model_directory(model)
    tokenizer, prefix = load_tokenizer(directory)
    evaluated = EvaluationModel.load(directory, "cpu")
    file = calibration_of(directory, "auto")
    calibration = None if file is None else file.whole
    config = CompressionConfig(
        method="sculpt",
        keep_ratio=keep_ratio,
        segment=segment or "auto",
        decode=decode,
        decode_keep_ratio=decode_keep_ratio,
    ).for_model(evaluated.query_numbers)
    setup = Setup(evaluated, surveyed("sculpt", calibration=calibration), EFFORTS[effort], config)

    def tokenise(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    of_text, of_other = (tokenise(read_text(t)) for t in (text, other))
    result: dict[str, Any] = {
        "model": directory.name,
        "text": Path(text).name,
        "contexts": contexts,
        "prompt": prompt,
        "keep_ratio": keep_ratio,
        "effort": effort,
        "calibrated": calibration is not None,
    }
    if {"answers", "work"} & set(chosen):
        result |= {"answer": answer, "decode": decode, "decode_keep_ratio": decode_keep_ratio}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    with torch.no_grad():
        if "answers" in chosen:
            by_segments = defaultdict[int, list[TokenScores]](list)
            for passage in track(passages(of_text, prompt, answer, contexts, 0, prefix), "answers", console=console):
                for made, scores in scored(setup, [*passage.context, *passage.continuation], prompt):
                    by_segments[made].append(scores)
            found["answers"] = {made: told(scores) for made, scores in by_segments.items()}
            shown(f"an answer of {answer:,} tokens behind {prompt:,}", "segments of the answer", found["answers"])
        if "afar" in chosen:
            by_distance = defaultdict[int, list[TokenScores]](list)
            for passage in track(passages(of_text, prompt, FOLLOWING, contexts, 0, prefix), "afar", console=console):
                for distance in BETWEEN:
                    scores = read_from_afar(setup, passage.context, of_other[:distance], passage.continuation)
                    by_distance[distance].append(scores)
            found["afar"] = {distance: told(scores) for distance, scores in by_distance.items()}
            shown(f"a segment of {prompt:,} tokens, read from afar", "other tokens between", found["afar"])
        if "work" in chosen:
            result["work"] = {}
            for name in TASKS:
                by_made = defaultdict[int, list[np.ndarray]](list)
                for seed in track(range(contexts), name, console=console):
                    for made, found_right in right(setup, work(name, tokenise, prompt, answer, seed, prefix)):
                        by_made[made].append(found_right)
                result["work"][name] = {made: accuracy(parts) for made, parts in by_made.items()}
                shown_work(name, result["work"][name])
    result |= found
    if png is not None and found:
        draw(found, png)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
