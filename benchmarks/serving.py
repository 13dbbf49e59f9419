"""Stock vLLM and the plugin at the same KV memory, same model, same prompts, alternating in one run.

(a) how many sequences are held at once before one is preempted; (b) throughput, TTFT and TPOT by `vllm bench serve`,
and with four times the memory, too (`roomy`); (c) KV bytes a sequence; (d) how often greedy answers from the sculpted
cache agree with exact ones; (e) throughput by the length of answers, with memory short and with plenty. Prints tables,
draws a PNG, ends with one JSON line.
`pip install '.[bench]'` first; run it on a machine that does nothing else.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from openai import OpenAI
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from kvsculpt_vllm.evaluation.texts import read_text
from kvsculpt_vllm.models import MODELS, fast_dtype, prepare
from kvsculpt_vllm.serving.launch import VLLM, Server, read_metrics, serve

MODEL = "model"  # the name it is served under
POLL_SECONDS = 0.1
BLOCK_SIZE = {"cpu": 32, "cuda": 16}
PARTS = ("capacity", "throughput", "roomy", "quality", "answers")

console = Console(stderr=True, log_path=False)


@dataclass(frozen=True)
class System:
    """A server, and what its requests ask of it."""

    name: str
    server: Server
    compression: dict[str, Any]  # vllm_xargs

    @property
    def extra_body(self) -> dict[str, Any]:
        """What a request carries besides."""
        return {"ignore_eos": True} | ({"vllm_xargs": self.compression} if self.compression else {})

    def complete(self, prompt: str, tokens: int) -> Any:
        """One greedy answer of exactly so many tokens."""
        client = OpenAI(base_url=f"{self.server.address}/v1", api_key="unused", max_retries=0, timeout=3600)
        return client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=tokens, temperature=0, extra_body=self.extra_body
        )

    def read(self, path: str) -> Any:
        """The JSON at one of our own paths."""
        with urllib.request.urlopen(f"{self.server.address}{path}", timeout=600) as response:
            return json.load(response)

    def gauges(self) -> dict[str, float]:
        """vLLM's metrics without labels, summed."""
        totals: dict[str, float] = {}
        for family in read_metrics(self.server.address, timeout=600):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals


class Watch(threading.Thread):
    """Follows how many requests run, and whether one was preempted."""

    def __init__(self, system: System) -> None:
        super().__init__(daemon=True)
        self._system, self._over = system, threading.Event()
        self._before = system.gauges()["vllm:num_preemptions_total"]
        self.most, self.preemptions = 0, 0
        self._error: Exception | None = None

    def run(self) -> None:
        """Until `stop`."""
        try:
            while not self._over.wait(POLL_SECONDS):
                self._look()
        except Exception as error:  # noqa: BLE001 - raised again by `stop`
            self._error = error

    def _look(self) -> None:
        now = self._system.gauges()
        self.preemptions = int(now["vllm:num_preemptions_total"] - self._before)
        if self.preemptions == 0:
            self.most = max(self.most, int(now["vllm:num_requests_running"]))

    def stop(self) -> None:
        """End following; what went wrong meanwhile is raised."""
        self._over.set()
        self.join()
        if self._error is not None:
            raise self._error
        self._look()


def prompts_of(text: str, model: Path, tokens: int, count: int) -> list[str]:
    """`count` different pieces of the text of about `tokens` tokens, spread evenly over it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text, verbose=False).input_ids
    room = len(ids) - tokens
    if room < count:
        raise typer.BadParameter(f"has {len(ids)} tokens, {count} prompts of {tokens} need more", param_hint="--text")
    starts = [room * i // max(1, count - 1) for i in range(count)]
    return [tokenizer.decode(ids[start : start + tokens]) for start in starts]


def held_at_once(system: System, prompts: list[str], output_tokens: int) -> dict[str, Any]:
    """All prompts arrive together; the most that ran at the same time while none had been preempted."""
    watch = Watch(system)
    watch.start()
    with ThreadPoolExecutor(len(prompts)) as pool:
        done = list(pool.map(lambda prompt: system.complete(prompt, output_tokens), prompts))
    watch.stop()
    if any(answer.usage.completion_tokens != output_tokens for answer in done):
        raise RuntimeError(f"{system.name}: an answer is too short")
    return {"system": system.name, "held_at_once": watch.most, "preemptions": watch.preemptions, "arrived": len(done)}


def throughput(system: System, model: Path, prompts: list[str], output_tokens: int, concurrency: int) -> dict[str, Any]:
    """One run of `vllm bench serve`."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder, "prompts.jsonl")
        dataset.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        command = [*VLLM, "bench", "serve", "--backend", "openai"]
        command += ["--base-url", system.server.address, "--endpoint", "/v1/completions"]
        command += [
            "--model",
            MODEL,
            "--tokenizer",
            str(model),
            "--dataset-name",
            "custom",
            "--dataset-path",
            str(dataset),
        ]
        command += [
            "--skip-chat-template",
            "--custom-output-len",
            str(output_tokens),
            "--num-prompts",
            str(len(prompts)),
        ]
        command += ["--max-concurrency", str(concurrency), "--temperature", "0", "--disable-tqdm", "--disable-shuffle"]
        command += ["--extra-body", json.dumps(system.extra_body), "--percentile-metrics", "ttft,tpot"]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"vllm bench serve failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}")
        result = json.loads(Path(folder, "result.json").read_text())
    if result["completed"] != len(prompts):
        raise RuntimeError(f"{system.name}: only {result['completed']} of {len(prompts)} requests completed")
    numbers = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms")
    return {"system": system.name, "concurrency": concurrency} | {name: result[name] for name in numbers}


def by_answer(systems: list[System], model: Path, prompts: list[str], lengths: list[int]) -> list[dict[str, Any]]:
    """Throughput of answers of these lengths, all prompts at a time, the systems in turn."""
    rows = []
    for length in lengths:
        fresh = [f"{length}. {prompt}" for prompt in prompts]  # nothing is found in a prefix cache
        for system in systems:
            console.log(f"{system.name}, answers of {length} …")
            before = system.gauges()["vllm:num_preemptions_total"]
            row = throughput(system, model, fresh, length, len(fresh))
            preemptions = int(system.gauges()["vllm:num_preemptions_total"] - before)
            rows.append({"answer": length, "preemptions": preemptions} | row)
    return rows


def agreement(exact: System, sculpted: System, prompts: list[str], tokens: int) -> dict[str, Any]:
    """How far greedy answers agree, and what the engine says of the compressions they came from."""
    shares, equal_answers, errors, before, after = [], 0, [], [], []
    for prompt in prompts:
        wanted, answer = exact.complete(prompt, tokens), sculpted.complete(prompt, tokens)
        pair = list(zip(wanted.choices[0].text, answer.choices[0].text, strict=False))
        equal = next((i for i, (a, b) in enumerate(pair) if a != b), len(pair))
        shares.append(equal / max(1, len(wanted.choices[0].text)))
        equal_answers += equal == len(pair)
        story = sculpted.read(f"/kvsculpt/requests/{answer.id}")
        if (record := story["compression"]) is None:
            raise SystemExit(f"a prompt stayed exact ({story['outcome']}: {story['reason']}): nothing to compare")
        errors.append(record["error_after"])
        before.append(record["blocks_before"])
        after.append(record["blocks_after"])
    stats = sculpted.read("/kvsculpt/stats")
    block_bytes = stats["bytes_freed"] // stats["blocks_freed"]
    return {
        "prompts": len(prompts),
        "answers_equal": equal_answers,
        "share_equal_mean": statistics.mean(shares),
        "share_equal_median": statistics.median(shares),
        "held_out_error_mean": statistics.mean(errors),
        "kv_bytes_exact": statistics.mean(before) * block_bytes,
        "kv_bytes_sculpted": statistics.mean(after) * block_bytes,
    }


@contextmanager
def servers(
    model: Path, device: str, blocks: int, max_tokens: int, dtype: str, flags: list[str], prefix_caching: bool = False
) -> Iterator[tuple[Server, Server]]:
    """Stock vLLM and one with compression, each with so many KV blocks for requests."""
    common = ["--served-model-name", MODEL, "--max-model-len", str(max_tokens), "--block-size", str(BLOCK_SIZE[device])]
    common += ["--num-gpu-blocks-override", str(blocks + 1)]  # one is the null block
    common += ["--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching"]
    if device == "cpu":
        common += ["--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30)]
    else:  # both have a part of the device
        common += ["--gpu-memory-utilization", "0.4"]
    common += ["--dtype", dtype]
    with ExitStack() as stack:
        stock = stack.enter_context(serve(model, *common))
        yield stock, stack.enter_context(serve(model, *common, *flags))


def show(results: dict[str, Any]) -> None:
    """The tables."""
    out = Console()
    table = Table("", "held at once", "preemptions", "arrived", title="(a) sequences at the same KV memory")
    for row in results["capacity"]:
        table.add_row(row["system"], *(str(row[key]) for key in ("held_at_once", "preemptions", "arrived")))
    if results["capacity"]:
        out.print(table)
    table = Table("", "KV room for", "concurrency", "tokens/s", "TTFT median, p99 s", "TPOT median, p99 ms")
    table.title = "(b) vllm bench serve"
    for row in results["throughput"]:
        ttft, tpot = ([row[f"{which}_{name}_ms"] for which in ("median", "p99")] for name in ("ttft", "tpot"))
        table.add_row(
            row["system"],
            str(row["room"]),
            str(row["concurrency"]),
            f"{row['output_throughput']:.1f}",
            ", ".join(f"{value / 1000:.1f}" for value in ttft),
            ", ".join(f"{value:.0f}" for value in tpot),
        )
    if results["throughput"]:
        out.print(table)
    if (ratio := results.get("none_over_stock")) is not None:
        out.print(f"plugin, every request none, against stock: {ratio:.3f} of its throughput (median)")
    if answers := results["answers"]:
        table = Table("answer", "KV room for", "stock, tokens/s", "sculpt, tokens/s", "ratio", "preemptions")
        table.title = f"(e) {results['answer_prompt_tokens']}-token prompts, {answers[0]['concurrency']} at a time"
        for stock, sculpt in zip(answers[::2], answers[1::2], strict=True):
            rates = stock["output_throughput"], sculpt["output_throughput"]
            table.add_row(
                str(stock["answer"]),
                str(stock["room"]),
                *(f"{rate:.1f}" for rate in rates),
                f"{rates[1] / rates[0]:.2f}",
                f"{stock['preemptions']}, {sculpt['preemptions']}",
            )
        out.print(table)
    if (quality := results.get("quality")) is None:
        return
    table = Table("", "exact", "sculpted", title="(c), (d)")
    table.add_row("KV bytes a prompt", f"{quality['kv_bytes_exact']:,.0f}", f"{quality['kv_bytes_sculpted']:,.0f}")
    table.add_row("answers equal", "", f"{quality['answers_equal']} of {quality['prompts']}")
    table.add_row("share of an answer before it differs, mean", "", f"{quality['share_equal_mean']:.2f}")
    table.add_row("held-out error, mean", "0", f"{quality['held_out_error_mean']:.4f}")
    out.print(table)


def draw(results: dict[str, Any], path: Path) -> None:
    """Two pictures: sequences held, and throughput by concurrency."""
    from matplotlib import pyplot as plt

    figure, (left, right, far) = plt.subplots(1, 3, figsize=(14, 4))
    rows = results["capacity"]
    left.bar([row["system"] for row in rows], [row["held_at_once"] for row in rows])
    left.set_ylabel("sequences held at once")
    for name in dict.fromkeys(row["system"] for row in results["throughput"]):
        rows = [row for row in results["throughput"] if row["system"] == name and row["room"] == results["sequences"]]
        levels = sorted({row["concurrency"] for row in rows})
        medians = [
            statistics.median(row["output_throughput"] for row in rows if row["concurrency"] == level)
            for level in levels
        ]
        right.plot(levels, medians, "o-", label=name)
    right.set(xlabel="concurrency", ylabel="output tokens/s", ylim=(0, None))
    right.legend()
    for room in sorted({row["room"] for row in results["answers"]}):
        for name in ("stock", "sculpt"):
            rows = [row for row in results["answers"] if row["system"] == name and row["room"] == room]
            lengths, rates = [row["answer"] for row in rows], [row["output_throughput"] for row in rows]
            far.plot(lengths, rates, "o-", label=f"{name}, memory for {room}")
    far.set(xlabel="tokens of an answer", ylabel="output tokens/s", ylim=(0, None))
    if results["answers"]:
        far.legend()
    figure.suptitle(f"{results['model']}, {results['prompt_tokens']}-token prompts, {results['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    model: Annotated[str, typer.Option(help=f"A directory, or one of {', '.join(MODELS)}.")] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="A UTF-8 file, or pydoc.")] = "pydoc",
    device: Annotated[str, typer.Option(help="cpu or cuda: what vLLM runs on here.")] = "cpu",
    prompt_tokens: int = 2000,
    output_tokens: int = 96,
    sequences: Annotated[int, typer.Option(help="Uncompressed sequences that the KV memory has room for.")] = 8,
    concurrency: Annotated[list[int], typer.Option(help="May be given several times.")] = [4, 8, 16],  # noqa: B006
    keep_ratio: float = 0.3,
    effort: str = "fast",
    dtype: Annotated[str, typer.Option(help="On a CPU without bfloat16 instructions float32.")] = fast_dtype(),
    parts: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(PARTS)}.")] = ",".join(PARTS),
    answers: Annotated[list[int], typer.Option(help="Tokens, of the part `answers`.")] = [64, 256, 1000],  # noqa: B006
    answer_prompt_tokens: Annotated[int, typer.Option(help="Of the part `answers`.")] = 600,
    rounds: Annotated[int, typer.Option(help="Of stock and none, alternating, for their ratio.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    png: Annotated[Path | None, typer.Option("--png")] = None,
) -> None:
    """Measure what compression buys and what it costs."""
    chosen = [part.strip() for part in parts.split(",")]
    if unknown := [part for part in chosen if part not in PARTS]:
        raise typer.BadParameter(f"got {', '.join(unknown)}, allowed: {', '.join(PARTS)}", param_hint="--parts")
    if {"throughput", "roomy", "answers"} & set(chosen) and find_spec("pandas") is None:
        raise SystemExit("vllm bench serve needs pandas to read prompts: pip install '.[bench]'")
    if device not in BLOCK_SIZE:
        raise typer.BadParameter(f"got {device}, allowed: cpu, cuda", param_hint="--device")
    directory = prepare(model) if model in MODELS else Path(model)
    max_tokens = prompt_tokens + output_tokens + 64  # a piece of text may become a few tokens more
    blocks = math.ceil((prompt_tokens + output_tokens) / BLOCK_SIZE[device])
    prompts = prompts_of(read_text(text), directory, prompt_tokens, max(3 * sequences, *concurrency))
    flags = ["--kv-compression", "sculpt", "--kv-compression-keep-ratio", str(keep_ratio)]
    flags += ["--kv-compression-effort", effort]
    if device == "cpu":
        # A compression takes seconds here: in slices of the default bound the answers would be over before their turn.
        flags += ["--kv-compression-max-stall-ms", "60000"]
    results: dict[str, Any] = {
        "model": model,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "keep_ratio": keep_ratio,
        "effort": effort,
        "dtype": dtype,
        "sequences": sequences,
        "answer_prompt_tokens": answer_prompt_tokens,
        "capacity": [],
        "throughput": [],
        "answers": [],
    }

    def measure(room: int, levels: list[int], systems: list[System]) -> None:
        for level in levels:
            for system in systems:
                console.log(f"{system.name}, room for {room}, concurrency {level} …")
                row = throughput(system, directory, prompts[: max(sequences, level)], output_tokens, level)
                results["throughput"].append({"room": room} | row)

    if "answers" in chosen:
        short = prompts_of(read_text(text), directory, answer_prompt_tokens, 2 * sequences)
        longest = answer_prompt_tokens + max(answers) + 64
        one = math.ceil(longest / BLOCK_SIZE[device])
        for room in (sequences, 2 * sequences):
            # Answers are packed as they grow, which takes the prefix cache.
            with servers(directory, device, room * one, longest, dtype, flags, prefix_caching=True) as pair:
                both = [System("stock", pair[0], {}), System("sculpt", pair[1], {})]
                results["answers"] += [{"room": room} | row for row in by_answer(both, directory, short, answers)]
    if set(chosen) == {"answers"}:
        finish(results, json_path, png)
        return
    with servers(directory, device, sequences * blocks, max_tokens, dtype, flags) as (stock_server, plugin_server):
        stock = System("stock", stock_server, {})
        none = System("none", plugin_server, {"kv_compression": "none"})
        sculpt = System("sculpt", plugin_server, {})
        for system in (stock, none):  # what is done once is not part of any figure
            system.complete(prompts[0], 4)
        if "quality" in chosen:
            console.log("answers, exact and sculpted …")
            results["quality"] = agreement(none, sculpt, prompts[:sequences], 64)
        if "capacity" in chosen:
            for system in (stock, sculpt):
                console.log(f"{system.name}: {len(prompts)} prompts at once …")
                results["capacity"].append(held_at_once(system, prompts, output_tokens))
            held = {row["system"]: row["held_at_once"] for row in results["capacity"]}
            results["held_ratio"] = held["sculpt"] / held["stock"]
        if "throughput" in chosen:
            ratios = []
            for number in range(rounds):
                measure(sequences, [sequences], [stock, none] if number % 2 == 0 else [none, stock])
                last = {row["system"]: row["output_throughput"] for row in results["throughput"][-2:]}
                ratios.append(last["none"] / last["stock"])
            results["none_over_stock_rounds"], results["none_over_stock"] = ratios, statistics.median(ratios)
            measure(sequences, concurrency, [stock, sculpt])
    if "roomy" in chosen:
        with servers(directory, device, 4 * sequences * blocks, max_tokens, dtype, flags) as (
            stock_server,
            plugin_server,
        ):
            roomy = [System("stock", stock_server, {}), System("sculpt", plugin_server, {})]
            measure(4 * sequences, [max(concurrency)], roomy)
    finish(results, json_path, png)


def finish(results: dict[str, Any], json_path: Path | None, png: Path | None) -> None:
    """Tables, picture, and the JSON line."""
    show(results)
    if png is not None:
        draw(results, png)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    typer.run(main)
