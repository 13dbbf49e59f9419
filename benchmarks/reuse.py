"""Does it pay to sculpt once and serve many? Stock vLLM and the plugin at the same KV memory, alternating in one run.

    python benchmarks/reuse.py [--documents 24] [--questions 8] [--json FILE] [--png FILE]

Several users ask questions about documents in a random order; the memory holds `--room` exact documents. Stock vLLM has
its prefix cache on. Further parts: the same after a restart, from the store; with documents that were precomputed; with
fewer documents than the memory holds, where stock vLLM is fine; how well answers agree. Prints tables, ends with one
JSON line. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from kvsculpt_vllm.evaluation.texts import read_text
from kvsculpt_vllm.models import MODELS, fast_dtype, prepare
from kvsculpt_vllm.serving.launch import Server, serve

MODEL = "model"  # the name it is served under
BLOCK_SIZE = {"cpu": 32, "cuda": 16}
PARTS = ("many", "restart", "precomputed", "few", "quality")
QUESTION_TOKENS = 24
QUESTIONS = (
    "In one sentence, this is about",
    "The first thing that is named here is",
    "A good title for it would be",
    "It ends with the words",
    "The most important word in it is",
    "Somebody who has read it would say",
    "What it does not say is",
    "The next paragraph would begin with",
)
NEW = "salt that nobody else has"  # nothing is found

console = Console(stderr=True, log_path=False)


@dataclass(frozen=True)
class Served:
    """One answer."""

    document: int
    question: int
    first_token: float  # seconds
    seconds: float
    prompt_tokens: int
    cached: int  # prompt tokens that were not computed
    text: str


@dataclass(frozen=True)
class Slice:
    """Some of the requests, on one system."""

    system: str
    begin: int  # the first one's place in the order
    seconds: float
    sculpting: float  # seconds, of these
    all_seen: bool  # every document had been asked about before
    served: list[Served]


class System:
    """A server, and users who ask it."""

    def __init__(self, name: str, server: Server, users: int, answer: int) -> None:
        self.name, self.server, self._users, self._answer = name, server, users, answer

    def run(self, order: list[tuple[int, int]], documents: list[str], **body: Any) -> list[Served]:
        """Every user asks the next question in the order as soon as the last one is answered."""
        return asyncio.run(self._run(order, documents, body))

    async def _run(self, order: list[tuple[int, int]], documents: list[str], body: dict[str, Any]) -> list[Served]:
        waiting, served = iter(order), {}
        client = AsyncOpenAI(base_url=f"{self.server.address}/v1", api_key="unused", max_retries=0, timeout=3600)

        async def user() -> None:
            for document, question in waiting:
                prompt = f"{documents[document]}\n\n{QUESTIONS[question]}"
                served[document, question] = await self._ask(client, document, question, prompt, body)

        async with client:
            await asyncio.gather(*(user() for _ in range(self._users)))
        return [served[pair] for pair in order]

    async def _ask(self, client: AsyncOpenAI, document: int, question: int, prompt: str, body: dict) -> Served:
        begin, first, text, usage = time.perf_counter(), 0.0, "", None
        stream = await client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=self._answer,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True} | body,
        )
        async for chunk in stream:
            if chunk.choices and not first:
                first = time.perf_counter() - begin
            text += "".join(choice.text for choice in chunk.choices)
            usage = chunk.usage or usage
        assert usage is not None
        details = usage.prompt_tokens_details
        cached = (details.cached_tokens if details else 0) or 0
        seconds = time.perf_counter() - begin
        return Served(document, question, first, seconds, usage.prompt_tokens, cached, text)

    def sculpting(self) -> float:
        """Seconds that were spent on making segments so far; 0 for stock vLLM."""
        if self.name == "stock":
            return 0.0
        with urllib.request.urlopen(f"{self.server.address}/kvsculpt/stats", timeout=600) as response:
            return json.load(response)["seconds"]["sum"]


def alternate(systems: list[System], order: list[tuple[int, int]], documents: list[str], size: int) -> list[Slice]:
    """All systems answer the same slices of the order, in turn."""
    slices: list[Slice] = []
    for number, begin in enumerate(range(0, len(order), size)):
        seen = {document for document, _ in order[:begin]}
        for system in systems if number % 2 == 0 else systems[::-1]:
            before, started = system.sculpting(), time.perf_counter()
            served = system.run(order[begin : begin + size], documents)
            seconds = time.perf_counter() - started
            spent = system.sculpting() - before
            slices.append(Slice(system.name, begin, seconds, spent, len(seen) == len(documents), served))
            console.log(f"{system.name}: {begin + len(served)} of {len(order)}, {len(served) / seconds:.2f} requests/s")
    return slices


def summed_up(slices: list[Slice]) -> dict[str, float]:
    """The figures of some slices of one system."""
    served = [one for part in slices for one in part.served]
    firsts = sorted(one.first_token for one in served)
    prompt = sum(one.prompt_tokens for one in served)
    return {
        "requests": len(served),
        "requests_per_s": len(served) / sum(part.seconds for part in slices),
        "first_token_median_s": median(firsts),
        "first_token_p99_s": firsts[min(len(firsts) - 1, math.ceil(0.99 * len(firsts)) - 1)],
        "hit_rate": sum(one.cached for one in served) / prompt,
        "tokens_computed": prompt - sum(one.cached for one in served),
        "sculpting_s": sum(part.sculpting for part in slices),
    }


def compared(slices: list[Slice]) -> dict[str, Any]:
    """Both systems, over all and once every document has been asked about; and their ratios."""
    result: dict[str, Any] = {}
    for when, chosen in (("in_all", slices), ("steady", [part for part in slices if part.all_seen])):
        if not chosen:
            continue
        own = {name: summed_up([p for p in chosen if p.system == name]) for name in ("stock", "plugin")}
        result[when] = own | {
            "requests_ratio": own["plugin"]["requests_per_s"] / own["stock"]["requests_per_s"],
            "first_token_ratio": own["stock"]["first_token_median_s"] / own["plugin"]["first_token_median_s"],
        }
    return result


def pays_from(many: dict[str, Any], documents: int) -> float | None:
    """Questions a document, on average, from which on the plugin has taken less time than stock vLLM. None where it
    never has.

    The plugin takes some seconds once a document, and fewer for each question than stock vLLM, which computes again
    what its memory did not keep.
    """
    stock, plugin, steady = many["in_all"]["stock"], many["in_all"]["plugin"], many["steady"]["plugin"]
    once = plugin["requests"] * (1 / plugin["requests_per_s"] - 1 / steady["requests_per_s"]) / documents
    saved = 1 / stock["requests_per_s"] - 1 / steady["requests_per_s"]
    return once / saved if saved > 0 else None


def resident(system: System, documents: list[str], newest_first: list[int]) -> int:
    """Documents that the cache holds: asked for from the one used last on, until one is not found."""
    one_user = System(system.name, system.server, 1, 1)
    for count, document in enumerate(newest_first):
        (answer,) = one_user.run([(document, 0)], documents)
        if answer.cached < answer.prompt_tokens // 2:
            return count
    return len(newest_first)


def agreement(slices: list[Slice]) -> dict[str, float]:
    """How far greedy answers of both systems are the same."""
    texts: dict[str, dict[tuple[int, int], str]] = {"stock": {}, "plugin": {}}
    for part in slices:
        texts[part.system] |= {(one.document, one.question): one.text for one in part.served}
    shares = []
    for pair, exact in texts["stock"].items():
        same = next((i for i, (a, b) in enumerate(zip(exact, texts["plugin"][pair], strict=False)) if a != b), None)
        shares.append(1.0 if same is None else same / max(1, len(exact)))
    return {"answers": len(shares), "equal": mean(share == 1 for share in shares), "same_until": mean(shares)}


def quality(directory: str, documents: list[str], tokens: int, keep_ratio: float, effort: str) -> dict[str, float]:
    """KL of what follows in the text, by `kvsculpt eval` on the documents; its method has what the server has."""
    with tempfile.TemporaryDirectory() as folder:
        text, rows = Path(folder, "documents.txt"), Path(folder, "rows.json")
        text.write_text("".join(documents), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("kvsculpt")), "eval", "--model", directory, "--text", str(text)]
        command += ["--context", str(tokens), "--continuation", "128", "--num-contexts", "4", "--methods", "sculpt"]
        command += ["--budget", "adaptive", "--keep-ratio", str(keep_ratio), "--effort", effort, "--json", str(rows)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (row,) = json.loads(rows.read_text())
    return {key: row[key] for key in ("kl_mean", "kl_p99", "top1_agreement", "kept_fraction") if key in row}


@contextmanager
def server(directory: str, flags: list[str]) -> Iterator[Server]:
    """A server with what both systems have."""
    with serve(Path(directory), *flags) as running:
        yield running


def show(results: dict[str, Any]) -> None:
    """The tables."""
    out = Console()
    for part in ("many", "few", "restart", "precomputed"):
        for when, both in results.get(part, {}).items():
            if not isinstance(both, dict) or "plugin" not in both:
                continue
            table = Table("", *(name for name in ("stock", "plugin") if name in both), title=f"{part}, {when}")
            for key in both["plugin"]:
                table.add_row(key, *(f"{both[name][key]:.3g}" for name in ("stock", "plugin") if name in both))
            out.print(table)
            if "requests_ratio" in both:
                out.print(
                    f"requests/s, plugin / stock: {both['requests_ratio']:.2f}; first token, stock / plugin: "
                    f"{both['first_token_ratio']:.1f}"
                )
    for name in ("restart", "precomputed"):
        if name in results:
            out.print(f"{name}, first question of each document: {json.dumps(results[name]['first'])}")
    for name in ("pays_from_questions", "resident", "agreement", "quality"):
        if name in results:
            out.print(f"{name}: {json.dumps(results[name])}")


def draw(slices: list[Slice], path: Path) -> None:
    """Two pictures over the run: requests/s, and the time to the first token."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name in ("stock", "plugin"):
        own = [part for part in slices if part.system == name]
        ends = [part.begin + len(part.served) for part in own]
        left.plot(ends, [len(part.served) / part.seconds for part in own], "o-", label=name)
        right.plot(ends, [median(one.first_token for one in part.served) for part in own], "o-", label=name)
    left.set(xlabel="requests", ylabel="requests/s", ylim=(0, None))
    right.set(xlabel="requests", ylabel="first token, median, seconds", yscale="log")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    model: Annotated[str, typer.Option(help=f"A directory, or one of {', '.join(MODELS)}.")] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="A UTF-8 file, or a name as in `kvsculpt eval --text`.")] = "pydoc",
    device: Annotated[str, typer.Option(help="cpu or cuda: what vLLM runs on here.")] = "cpu",
    documents: Annotated[int, typer.Option(min=1)] = 24,
    tokens: Annotated[int, typer.Option(min=600, help="Of a document.")] = 2000,
    questions: Annotated[int, typer.Option(min=1, max=len(QUESTIONS), help="For each document.")] = 8,
    room: Annotated[int, typer.Option(min=1, help="Exact documents that the KV memory holds.")] = 8,
    few: Annotated[int, typer.Option(min=1, help="Documents of the part `few`.")] = 6,
    users: Annotated[int, typer.Option(min=1, help="Who ask at once.")] = 4,
    answer: Annotated[int, typer.Option(min=2, help="Tokens.")] = 16,
    keep_ratio: float = 0.3,
    effort: str = "fast",
    dtype: Annotated[str, typer.Option(help="On a CPU without bfloat16 instructions float32.")] = fast_dtype(),
    seed: int = 0,
    parts: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(PARTS)}.")] = ",".join(PARTS),
    json_path: Annotated[Path | None, typer.Option("--json", help="A file for the JSON line, too.")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="A picture of the run over time.")] = None,
) -> None:
    """Measure and print."""
    chosen = [part.strip() for part in parts.split(",")]
    if unknown := [part for part in chosen if part not in PARTS]:
        raise typer.BadParameter(f"got {', '.join(unknown)}, allowed: {', '.join(PARTS)}", param_hint="--parts")
    if device not in BLOCK_SIZE:
        raise typer.BadParameter(f"got {device}, allowed: cpu, cuda", param_hint="--device")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    directory = str(prepare(model)) if model in MODELS else model
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(read_text(text), verbose=False).input_ids
    if len(ids) < documents * tokens:
        raise typer.BadParameter(f"has {len(ids)} tokens, {documents * tokens} are needed", param_hint="--text")
    texts = [tokenizer.decode(ids[i * tokens : (i + 1) * tokens]) for i in range(documents)]
    longest = tokens + QUESTION_TOKENS + answer + 64  # a piece of text may become a few tokens more
    blocks = room * math.ceil(longest / BLOCK_SIZE[device])
    common = ["--served-model-name", MODEL, "--block-size", str(BLOCK_SIZE[device]), "--dtype", dtype]
    common += ["--max-model-len", str(2 * tokens), "--num-gpu-blocks-override", str(blocks + 1)]
    common += ["--enable-prompt-tokens-details"]
    if device == "cpu":
        common += ["--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30)]
    else:  # both servers have a part of the device
        common += ["--gpu-memory-utilization", "0.4"]
    ours = ["--kv-compression", "sculpt", "--kv-compression-keep-ratio", str(keep_ratio)]
    ours += ["--kv-compression-effort", effort]
    if device == "cpu":
        # A segment takes seconds here: in slices of the default bound short answers would be over before it is made.
        ours += ["--kv-compression-max-stall-ms", "60000"]
    order = [(document, question) for document in range(documents) for question in range(questions)]
    random.Random(seed).shuffle(order)
    results: dict[str, Any] = {
        "model": model,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        **{name: value for name, value in locals().items() if name in SETTINGS},
    }
    store = tempfile.mkdtemp(prefix="kvsculpt-reuse-")
    slices: list[Slice] = []
    try:
        with ExitStack() as stack:
            stock = System("stock", stack.enter_context(server(directory, common)), users, answer)
            with_store = [*ours, "--kv-compression-store", store]
            if {"many", "few"} & set(chosen):
                plugin = System("plugin", stack.enter_context(server(directory, common + with_store)), users, answer)
                warm = [texts[0][: len(texts[0]) // 2]]
                for system in (stock, plugin):  # what is done once is no part of any figure
                    system.run([(0, 0)], warm, cache_salt=NEW)
            if "many" in chosen:
                slices = alternate([stock, plugin], order, texts, documents)
                results["many"] = compared(slices)
                if "steady" in results["many"] and documents > room:
                    results["pays_from_questions"] = pays_from(results["many"], documents)
                newest = list(dict.fromkeys(document for document, _ in reversed(order)))
                results["resident"] = {s.name: resident(s, texts, newest) for s in (stock, plugin)}
                results["agreement"] = agreement(slices)
            if "few" in chosen:
                # Other documents, so that nothing is found of those before.
                others = [f"Number {i}. {one}" for i, one in enumerate(texts[:few])]
                some = [(document, question) for document, question in order if document < few]
                results["few_documents"] = few
                results["few"] = compared(alternate([stock, plugin], some, others, few))
            one_user = System("stock", stock.server, 1, answer)
            exact = [one_user.run([(i, 0)], texts, cache_salt=f"{NEW} {i}")[0] for i in range(min(8, documents))]
            exact_first = results["exact_prefill_s"] = median(one.first_token for one in exact)
        for part in ("restart", "precomputed"):
            if part not in chosen:
                continue
            if part == "precomputed" or not slices:
                shutil.rmtree(store)
                precompute(directory, store, texts, effort, [*common, *ours[2:4]])
            with server(directory, [*common, *with_store, "--kv-compression-store-mode", "read"]) as again:
                one_user = System("plugin", again, 1, answer)
                one_user.run([(0, 0)], ["A short prompt."])
                first = one_user.run([(i, 0) for i in range(documents)], texts)
                run = alternate([System("plugin", again, users, answer)], order, texts, documents)
            results[part] = {"in_all": {"plugin": summed_up(run)}}
            results[part]["first"] = {
                "first_token_median_s": median(one.first_token for one in first),
                "exact_first_token_median_s": exact_first,
                "ratio": median(one.first_token for one in first) / exact_first,
                "found": mean(one.cached > one.prompt_tokens // 2 for one in first),
            }
    finally:
        shutil.rmtree(store, ignore_errors=True)
    if slices:
        results["slices"] = [
            {k: v for k, v in asdict(part).items() if k != "served"} | {"figures": summed_up([part])} for part in slices
        ]
        if png is not None:
            draw(slices, png)
    if json_path is not None:  # the last part is short, and none before it is to be lost with it
        json_path.write_text(json.dumps(results, indent=1) + "\n")
    if "quality" in chosen:
        results["quality"] = quality(directory, texts, tokens, keep_ratio, effort)
    show(results)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


SETTINGS = ("text", "documents", "tokens", "questions", "room", "users", "answer", "keep_ratio", "effort")


def precompute(directory: str, store: str, texts: list[str], effort: str, flags: list[str]) -> None:
    """Fill a store by `kvsculpt precompute`, with the settings of the server to come."""
    unknown = ("--served-model-name", MODEL)
    flags = [flag for flag in flags if flag not in (*unknown, "--enable-prompt-tokens-details")]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.txt") for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text, encoding="utf-8")
        command = [str(Path(sys.executable).with_name("kvsculpt")), "precompute", "--model", directory]
        command += ["--store", store, "--effort", effort, *map(str, files), "--", *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    typer.run(main)
