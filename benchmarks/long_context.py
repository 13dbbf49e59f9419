"""What segments gain where contexts and answers are long: prompts longer than the memory, long answers, linear time.

    python benchmarks/long_context.py [--prompt TOKENS] [--answer TOKENS]

One engine after the other, each in a process of its own, on the CPU build with the embedded model: stock vLLM and the
plugin with memory for all of it, and the plugin with memory for half. Stock vLLM with that much does not start, and the
benchmark says so. Ratios are of one run on one machine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvsculpt_vllm.evaluation.texts import read_text
from kvsculpt_vllm.models import fast_dtype, prepare

# The engine in its process, and threads that do not spin, before vLLM is imported.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_WAIT_POLICY": "PASSIVE", "VLLM_LOGGING_LEVEL": "WARNING"}

BLOCK_SIZE, MOST, ANSWER = 32, 8192, 64

PARTS = ("memory", "answer", "time")

Prompt = tuple[str, int, int, int]  # a text, the token to begin at, tokens, and tokens to generate

console = Console(stderr=True)


def serve(blocks: int | None, settings: dict[str, Any] | None, prompts: list[Prompt]) -> list[Any]:
    """One engine's answers, one request after the other.

    Args:
        blocks: of KV cache; None for as many as the longest context takes.
        settings: of compression; None for stock vLLM.
        prompts: one request each.
    """
    from vllm import LLM, SamplingParams

    config = {} if settings is None else {"additional_config": {"kv_compression": settings}}
    llm = LLM(
        str(prepare("smollm2-135m")),
        dtype=fast_dtype(),
        block_size=BLOCK_SIZE,
        max_model_len=MOST,
        num_gpu_blocks_override=blocks or MOST // BLOCK_SIZE + 200,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
        **config,
    )
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    texts = {text: tokenizer.encode(read_text(text)[:400_000]) for text in {prompt[0] for prompt in prompts}}
    answers = []
    for number, (text, begin, length, generate) in enumerate(prompts):
        tokens = texts[text][begin : begin + length]
        params = SamplingParams(temperature=0, max_tokens=generate, ignore_eos=True)
        free, start, held, first = pool.get_num_free_blocks(), time.perf_counter(), [], None
        engine.add_request(str(number), {"prompt_token_ids": tokens}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                final = output
                if first is None and output.outputs[0].token_ids:
                    first = time.perf_counter() - start
            if engine.has_unfinished_requests():
                held.append(free - pool.get_num_free_blocks())
        engine.step()
        llm.reset_prefix_cache()
        made = (final.kv_transfer_params or {}).get("kv_compression") or {}
        answers.append(
            {
                "tokens": list(final.outputs[0].token_ids),
                "reason": final.outputs[0].finish_reason,
                "first_token_s": first,
                "seconds": time.perf_counter() - start,
                "blocks_at_end": held[-1],
                "most_blocks": max(held),
                "told": made,
            }
        )
    if settings is not None:
        answers.append(llm.collective_rpc("kv_compression_report", args=(1000,))[0]["newest"][::-1])
    return answers


def in_a_process(*job: Any) -> list[Any] | str:
    """What `serve` gives, or the error that it ended with."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply(serve, job)
        except (ValueError, RuntimeError) as error:
            return str(error)


def agreement(exact: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> float:
    """The part of each answer before it leaves the exact one, on average."""
    shares = []
    for one, other in zip(exact, ours, strict=True):
        # One that ended before it was served has fewer.
        pairs = list(zip(one["tokens"], other["tokens"], strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        shares.append(same / len(one["tokens"]))
    return mean(shares)


def served(*job: Any) -> list[Any]:
    """What `serve` gives, in a process of its own.

    Raises:
        SystemExit: the engine ended with an error.
    """
    result = in_a_process(*job)
    if isinstance(result, str):
        raise SystemExit(result)
    return result


def long_prompts(prompts: list[Prompt], blocks: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Prompts longer than a memory of so many blocks, beside stock vLLM and the plugin with memory for them."""
    exact = served(None, None, prompts)
    refused = in_a_process(blocks, None, prompts[:1])
    *with_memory, _ = served(None, settings, prompts)
    *little, _ = served(blocks, settings, prompts)
    return {
        "blocks": blocks - 1,
        "tokens_of_memory": (blocks - 1) * BLOCK_SIZE,
        "stock_starts": not isinstance(refused, str),
        "served": [one["reason"] for one in little],
        "most_blocks": [one["most_blocks"] for one in little],
        "agreement_with_memory": agreement(exact, with_memory),
        "agreement_with_little": agreement(exact, little),
        "little_and_memory_agree": agreement(with_memory, little),
    }


def long_answer(prompt: Prompt, settings: dict[str, Any]) -> dict[str, Any]:
    """The blocks that are held at the end of a long answer, beside stock vLLM's."""
    (exact,), (ours, _) = served(None, None, [prompt]), served(None, settings, [prompt])
    return {
        "answer": prompt[-1],
        "blocks_exact": exact["blocks_at_end"],
        "blocks_sculpted": ours["blocks_at_end"],
        "blocks_ratio": ours["blocks_at_end"] / exact["blocks_at_end"],
        "answer_seconds": [exact["seconds"], ours["seconds"]],
    }


def linear_time(sizes: list[Prompt], settings: dict[str, Any]) -> dict[str, Any]:
    """The seconds of sculpting a prompt and one of four times as many tokens, by the engine's own clock."""
    *_, stories = served(None, settings, sizes)
    seconds = [story["compression"]["seconds"] for story in stories if story["compression"]][-2:]
    return {
        "sculpt_seconds": {str(size[2]): took for size, took in zip(sizes, seconds, strict=True)},
        "time_ratio": seconds[1] / (4 * seconds[0]),
    }


def main(
    texts: Annotated[str, typer.Option(help="Texts, or names as in `kvsculpt eval --text`, by commas.")] = "pydoc",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 7900,
    prompts: Annotated[int, typer.Option(help="Prompts of each text.")] = 2,
    answer: Annotated[int, typer.Option(help="Tokens of the long answer.")] = 3000,
    blocks: Annotated[int, typer.Option(help="Of KV cache, for the engine that has too few.")] = 126,
    segment: Annotated[int, typer.Option(help="Tokens of a segment, there.")] = 1024,
    effort: Annotated[str, typer.Option(help="fast, balanced or thorough.")] = "fast",
    keep_ratio: Annotated[float, typer.Option(help="Fraction of the entries that is kept.")] = 0.3,
    parts: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(PARTS)}.")] = ",".join(PARTS),
    json_path: Annotated[Path | None, typer.Option("--json", help="A file for the JSON line, too.")] = None,
) -> None:
    """Measure and print."""
    chosen = [part.strip() for part in parts.split(",")]
    if unknown := [part for part in chosen if part not in PARTS]:
        raise typer.BadParameter(f"got {', '.join(unknown)}, allowed: {', '.join(PARTS)}", param_hint="--parts")
    settings = {"method": "sculpt", "effort": effort, "keep_ratio": keep_ratio}
    names = texts.split(",")
    results: dict[str, Any] = {}
    table = Table("", "figure", title=f"SmolLM2-135M, keep {keep_ratio}, {effort}")
    if "memory" in chosen:
        prompts_of_texts = [(text, 9000 * i, prompt, ANSWER) for text in names for i in range(prompts)]
        results |= long_prompts(prompts_of_texts, blocks, {**settings, "segment": segment})
        table.add_row(
            f"prompts of {prompt} tokens, memory for {results['tokens_of_memory']}", ", ".join(results["served"])
        )
        table.add_row("stock vLLM with that memory", "starts" if results["stock_starts"] else "does not start")
        table.add_row("the answer is the exact one up to: with memory", f"{results['agreement_with_memory']:.0%}")
        table.add_row("with little", f"{results['agreement_with_little']:.0%}")
    if "answer" in chosen:
        results |= long_answer((names[0], 20_000, 100, answer), settings)
        held = f"{results['blocks_sculpted']} of {results['blocks_exact']} ({results['blocks_ratio']:.2f})"
        table.add_row(f"blocks held after {answer} generated tokens", held)
    if "time" in chosen:
        results |= linear_time([(names[0], 40_000, length, 4) for length in (MOST // 4, MOST - 8)], settings)
        table.add_row(
            f"seconds to sculpt {MOST - 8} tokens / 4 x those for {MOST // 4}", f"{results['time_ratio']:.2f}"
        )
    console.print(table)
    line = json.dumps({"keep_ratio": keep_ratio, "effort": effort, "segment": segment, "prompt": prompt, **results})
    if json_path is not None:
        json_path.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    typer.run(main)
