"""What sharing sculpted prefixes gains: a second question, a conversation, several requests at once; exact beside it.

    python benchmarks/sharing.py [--document TOKENS] [--rounds N]

One engine in this process, on the CPU build with the embedded model. Exact requests ask for `kv_compression: none`, and
get stock vLLM's tokens and cache. Ratios are of one run on one machine; seconds are that machine's.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvsculpt_vllm.evaluation.texts import read_text
from kvsculpt_vllm.models import fast_dtype, prepare

# The engine in this process, and threads that do not spin, before vLLM is imported.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_WAIT_POLICY": "PASSIVE", "VLLM_LOGGING_LEVEL": "WARNING"}

BLOCK_SIZE, ANSWER = 32, 24
TURNS, TURN, REPLY = 4, 600, 150
QUESTIONS = ("In one sentence, this is about", "The first thing named is", "A title would be", "It ends with")

console = Console(stderr=True)


@dataclass(frozen=True)
class Asked:
    """One request's answer."""

    tokens: list[int]
    first_token: float  # seconds
    cached: int  # prompt tokens that were not computed
    blocks: int  # held when the answer ended


class Engine:
    """vLLM's engine with compression, a step at a time."""

    def __init__(self, effort: str, keep_ratio: float) -> None:
        from vllm import LLM

        settings = {"method": "sculpt", "effort": effort, "keep_ratio": keep_ratio}
        self._llm = LLM(
            str(prepare("smollm2-135m")),
            dtype=fast_dtype(),
            block_size=BLOCK_SIZE,
            max_model_len=8192,
            kv_cache_memory_bytes=1 << 30,
            enforce_eager=True,
            additional_config={"kv_compression": settings},
        )
        self._engine = self._llm.llm_engine
        self._pool = self._engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        self._count = 0

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self._llm.get_tokenizer().encode(text)

    def forget(self) -> None:
        """Empty the prefix cache."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use")

    def ask(self, prompts: list[list[int]], method: str, length: int = ANSWER) -> list[Asked]:
        """Let all prompts run at once."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=length, ignore_eos=True, extra_args={"kv_compression": method}
        )
        free, begin, first, final = self._pool.get_num_free_blocks(), time.perf_counter(), {}, {}
        names = [f"{self._count + i}" for i in range(len(prompts))]
        self._count += len(prompts)
        for name, prompt in zip(names, prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        held = 0
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.outputs[0].token_ids:
                    first.setdefault(output.request_id, time.perf_counter() - begin)
                final[output.request_id] = output
            if len(final) == len(prompts) and not any(output.finished for output in final.values()):
                held = free - self._pool.get_num_free_blocks()
        self._engine.step()  # the workers hear of what finished
        return [
            Asked(list(final[name].outputs[0].token_ids), first[name], final[name].num_cached_tokens or 0, held)
            for name in names
        ]


def second_question(engine: Engine, documents: list[list[int]], questions: list[list[int]]) -> dict[str, Any]:
    """First token and blocks of another question about a document, exact without a cache and found sculpted."""
    rows = []
    for document in documents:
        engine.forget()
        (exact,) = engine.ask([document + questions[1]], "none")
        engine.forget()
        (made,) = engine.ask([document + questions[0]], "sculpt")
        (found,) = engine.ask([document + questions[1]], "sculpt")
        if not found.cached:
            raise RuntimeError("the document was not found")
        rows.append((exact, made, found))
    return {
        "exact_first_token_s": median(exact.first_token for exact, _, _ in rows),
        "made_first_token_s": median(made.first_token for _, made, _ in rows),
        "found_first_token_s": median(found.first_token for _, _, found in rows),
        "first_token_ratio": median(found.first_token / exact.first_token for exact, _, found in rows),
        "blocks_exact": rows[0][0].blocks,
        "blocks_found": rows[0][2].blocks,
        "blocks_ratio": median(found.blocks / exact.blocks for exact, _, found in rows),
        "tokens_found": median(found.cached for _, _, found in rows),
    }


def conversation(engine: Engine, texts: list[list[int]]) -> dict[str, Any]:
    """Prompt tokens of later turns that were found in the cache, exact and sculpted."""
    cached = {}
    for method in ("none", "sculpt"):
        engine.forget()
        prompt, cached[method] = [], []
        for text in texts:
            prompt = prompt + text
            (asked,) = engine.ask([prompt], method, REPLY)
            cached[method].append(asked.cached)
            prompt = prompt + asked.tokens
    later = {method: sum(found[1:]) for method, found in cached.items()}
    return {
        "cached_exact": cached["none"],
        "cached_sculpted": cached["sculpt"],
        "ratio": later["sculpt"] / later["none"],
    }


def at_once(engine: Engine, document: list[int], questions: list[list[int]]) -> dict[str, Any]:
    """Blocks that several questions about one document hold when they end."""
    held = {}
    for method in ("none", "sculpt"):
        engine.forget()
        asked = engine.ask([document + question for question in questions], method, 4 * ANSWER)
        held[method] = asked[0].blocks
    return {"requests": len(questions), "blocks_exact": held["none"], "blocks_sculpted": held["sculpt"]} | {
        "ratio": held["sculpt"] / held["none"]
    }


def main(
    text: Annotated[str, typer.Option(help="A text, or a name as in `kvsculpt eval --text`.")] = "pydoc",
    document: Annotated[int, typer.Option(min=600, help="Tokens of a document.")] = 2000,
    rounds: Annotated[int, typer.Option(min=1, help="Documents to ask about.")] = 3,
    effort: Annotated[str, typer.Option(help="fast, balanced or thorough.")] = "fast",
    keep_ratio: Annotated[float, typer.Option(help="Fraction of a span's entries that is kept.")] = 0.3,
    json_path: Annotated[Path | None, typer.Option("--json", help="A file for the JSON line, too.")] = None,
) -> None:
    """Measure and print."""
    engine = Engine(effort, keep_ratio)
    tokens = engine.encode(read_text(text)[: 8 * (rounds + 4) * document])
    questions = [engine.encode(f"\n\n{question}") for question in QUESTIONS]
    documents = [tokens[i * document : (i + 1) * document] for i in range(rounds)]
    turns = [tokens[i * TURN : (i + 1) * TURN] for i in range(TURNS)]
    engine.ask([tokens[-700:]], "sculpt", 4)  # warm
    results = {
        "second_question": second_question(engine, documents, questions),
        "conversation": conversation(engine, turns),
        "at_once": at_once(engine, documents[0], questions),
    }
    second, turns_found, together = results.values()
    table = Table(
        "", "exact", "sculpted", "ratio", title=f"SmolLM2-135M, {document} tokens, keep {keep_ratio}, {effort}"
    )
    for name, exact, ours, ratio in (
        ("second question, first token (s)", "exact_first_token_s", "found_first_token_s", "first_token_ratio"),
        ("blocks held by it", "blocks_exact", "blocks_found", "blocks_ratio"),
    ):
        table.add_row(name, f"{second[exact]:.3g}", f"{second[ours]:.3g}", f"{second[ratio]:.3f}")
    table.add_row("first question, first token (s)", "", f"{second['made_first_token_s']:.3g}", "")
    table.add_row(
        f"conversation of {TURNS} turns, tokens found",
        str(turns_found["cached_exact"]),
        str(turns_found["cached_sculpted"]),
        f"{turns_found['ratio']:.2f}",
    )
    table.add_row(
        f"{together['requests']} questions at once, blocks at the end",
        str(together["blocks_exact"]),
        str(together["blocks_sculpted"]),
        f"{together['ratio']:.2f}",
    )
    console.print(table)
    line = json.dumps({"document": document, "keep_ratio": keep_ratio, "effort": effort, **results})
    if json_path is not None:
        json_path.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    typer.run(main)
