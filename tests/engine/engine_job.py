"""Run one vLLM engine in a process of its own, which reads jobs and writes results, a line of JSON each.

A process per engine, because the attention backend is chosen per process. Not a test module: `conftest.py` calls it.
The first job starts the engine; jobs after it may differ in `batches` and `abort_after`.

A job has `engine` (arguments of `LLM`), `batches` (lists of requests that run together, one list after the other; a
request is `start`, `length` and `max_tokens` plus optionally `extra_args`, `priority`, `fault`, `sampling` (more of its
`SamplingParams`) and the step it arrives after), and `identity`/`poison`/`v2`/`gpu_path`/`self_test`/`asynchronous`.
With several ranks each is a fork of this process. Before the batches named in `empty_before` the prefix cache is
emptied. With `cuda` it runs on a GPU, and nothing takes the place of one (`benchmarks/identity.py`).
"""

import json
import multiprocessing
import os
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from interpreter import interpret_triton

RESULT = sys.stdout
sys.stdout = sys.stderr  # vLLM and its libraries print; the result must stay alone

# In this process, so that the test-only method below is the one that runs.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# Beside the tests of servers, which vLLM puts on the first core; those that run behind them stay there (Makefile).
_CHOOSE = min if os.environ.get("KVSCULPT_TEST_CORE") == "first" else max
CORE = str(_CHOOSE(os.sched_getaffinity(0)))
# Idle threads must not spin: on a busy machine with two cores that makes every step many times slower.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# The stock kernel splits a row's keys among threads depending on the rest of the batch; without that split equal rows
# give equal bits, so that a difference in tokens is a difference in what was attended to.
os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"

POISON = 3.0e4


def install_identity(poison: bool) -> None:
    """Replace the method by one that keeps every entry, in page runs of shuffled order, and spoils the old blocks."""
    from dataclasses import fields, replace

    import torch

    from kvsculpt_vllm.engine.shared import spans
    from kvsculpt_vllm.engine.worker import compressor, pages
    from kvsculpt_vllm.sculpt.compress import Compressed, FittedBatch

    stock_next, stock_why = spans.next_span, spans.why_exact
    stock_solve, stock_commit, spans_of = compressor.Compressor.solve, compressor.Compressor.commit, {}

    def next_span(*args):
        span = stock_next(*args)
        return None if span is None else Whole(**vars(replace(span, packed_blocks=span.blocks)))

    def why_exact(*args):
        spans.next_span = stock_next  # else there would be nothing to free
        try:
            return stock_why(*args)
        finally:
            spans.next_span = next_span

    class Whole(spans.Span):
        def pays(self, own_blocks):
            return own_blocks >= self.packed_blocks

    def keep_all(source, plan, method, budget, effort, write, *args, **kwargs):
        count = source.num_problems
        for _ in range(source.num_layers):
            yield
        kept = slice(source.sinks, source.span)
        keys, values = source.keys[:, kept], source.values[:, kept]
        pages = [plan.span_pages] * count
        write(FittedBatch(list(range(count)), [keys.shape[1]] * count, keys, values), pages)
        told = {field.name: torch.zeros(count, device=source.device) for field in fields(Compressed)}
        return Compressed(**told | {"pages": pages, "keys": [], "values": []})

    def place(page_counts):
        starts, cell = [0] * len(page_counts), 0
        # The same order whenever it is asked for.
        for b in random.Random(0).sample(range(len(page_counts)), len(page_counts)):
            starts[b], cell = cell, cell + page_counts[b]
        return starts

    def solve(self, command, *args):
        record = yield from stock_solve(self, command, *args)
        span_blocks = command.span_tokens // self.state.geometry.block_size
        spans_of[command.request_id] = torch.tensor(command.exact[:span_blocks])
        return record

    def commit(self, command, *args):
        record = stock_commit(self, command, *args)
        if poison:
            geometry, freed = self.state.geometry, spans_of[command.request_id]
            self.state.pages.buffer[geometry.block_pages(freed.to(geometry.cell_pages.device))] = POISON
        return record

    spans.next_span, spans.why_exact = next_span, why_exact
    compressor.compress_segment_in_slices, pages.place = keep_all, place
    compressor.Compressor.solve, compressor.Compressor.commit = solve, commit


def install_faults(faults: dict[str, str], rank: int = 0) -> None:
    """Let the compression of a request (`batch-number`) fail on one rank: where and how its fault says."""
    import torch

    from kvsculpt_vllm.engine.worker import compressor, directory, pages
    from kvsculpt_vllm.engine.worker.state import CompressionState

    now = {"fault": None}

    def fault_of(request_id):
        return faults.get("-".join(request_id.split("-")[:2])) if torch.distributed.get_rank() == rank else None

    def failing(stock, *where):
        """`stock`, but raising where the fault of the request that is being compressed is one of `where`."""

        def call(*args, **kwargs):
            if now["fault"] in where:
                raise torch.OutOfMemoryError("injected") if "memory" in now["fault"] else ValueError("injected")
            return stock(*args, **kwargs)

        return call

    def solve(self, command, fallback=None):
        now["fault"] = fault_of(command.request_id)
        if now["fault"] == "once" and fallback:
            now["fault"] = None
        if now["fault"] == "queries not finite":
            self.state.samples[command.request_id]._pieces[0].queries[1, 5] = torch.nan
        try:
            return (yield from stock_solve(self, command, fallback))
        finally:
            now["fault"] = None

    def compress(source, plan, method, budget, effort, write, **kwargs):
        def spoiling(fitted, pages):
            if now["fault"] == "values not finite":
                fitted.values[0, 5, 0] = torch.nan
            write(fitted, pages)

        return (yield from stock_compress(source, plan, method, budget, effort, spoiling, **kwargs))

    class Unwritable:
        shape = (1, 1 << 30)

        def __setitem__(self, *args):
            raise RuntimeError("injected")

    def sample(self, command):
        stock_sample(self, command)
        if fault_of(command.request_id) == "capture":
            for piece in self.samples[command.request_id]._pieces:
                piece.queries = Unwritable()

    stock_solve, stock_compress, stock_sample = (
        compressor.Compressor.solve,
        failing(compressor.compress_segment_in_slices, "solve", "out of memory", "once", "always"),
        CompressionState.sample,
    )
    compressor.Compressor.solve, compressor.compress_segment_in_slices, CompressionState.sample = (
        solve,
        compress,
        sample,
    )
    pages.VectorPages.read = failing(pages.VectorPages.read, "gather")
    pages.VectorPages.write = failing(pages.VectorPages.write, "scatter")
    directory.Directory.prepare = failing(directory.Directory.prepare, "directory")


def use_gpu_path(self_test: bool) -> None:
    """Give the CPU worker what the GPU worker has: its attention backend, its pages, and its self-test if it is asked
    for, which takes longer than most jobs here.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from kvsculpt_vllm.engine.startup.refusals import cache
    from kvsculpt_vllm.engine.worker import worker
    from kvsculpt_vllm.engine.worker.worker_cpu import SculptCPUWorker
    from kvsculpt_vllm.engine.worker.worker_gpu import SculptGPUWorker

    if not self_test:
        worker.test_at_start_up = lambda subject, ranks: None
    cache.fp8_unread = lambda config: False  # that a GPU reads

    # Under the only name that vLLM's CPU platform asks for.
    SculptCPUWorker.attention_backend = (AttentionBackendEnum.CPU_ATTN, SculptGPUWorker.attention_backend[1])
    SculptCPUWorker.page_format = SculptGPUWorker.page_format


def schedule_asynchronously() -> None:
    """Let steps overlap as they do on a GPU: vLLM's CPU platform switches it off."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config):
        stock(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)


def ranks_of(job: dict) -> int:
    """How many processes have a part of its model."""
    return job["engine"].get("tensor_parallel_size", 1) * job["engine"].get("pipeline_parallel_size", 1)


def start(job: dict):
    """The engine that this job and those after it run on."""
    ranks = ranks_of(job)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join([CORE] * ranks)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(job.get("v2", False)))
    if (job.get("v2") or job.get("gpu_path")) and not job.get("cuda"):
        interpret_triton()
    if job.get("gpu_path"):
        use_gpu_path(job.get("self_test", False))
    if job.get("asynchronous"):
        schedule_asynchronously()

    from vllm import LLM

    if ranks > 1:
        from vllm.v1.executor import multiproc_executor

        # vLLM starts workers anew on a CPU; they would lack what is replaced here, and import for half a minute.
        multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    if "samples_bytes" in job or "sampled_segments" in job:
        from kvsculpt_vllm.engine.shared import sample_room

        sample_room.CPU_BYTES = job.get("samples_bytes", sample_room.CPU_BYTES)
        sample_room.SEGMENTS = job.get("sampled_segments", sample_room.SEGMENTS)
    if job.get("identity"):
        # No solver runs, so that the copies of pages can be kernels too.
        os.environ["KVSCULPT_KERNELS"] = "triton" if job.get("gpu_path") else ""
        install_identity(job.get("poison", False))
    faults = {
        f"{b}-{r}": request["fault"]
        for b, batch in enumerate(job["batches"])
        for r, request in enumerate(batch)
        if "fault" in request
    }
    if faults:
        install_faults(faults, job.get("fault_rank", 0))
    usual = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 29, "disable_log_stats": False}
    usual["skip_tokenizer_init"] = True  # prompts are tokens
    return LLM(**usual | job["engine"])


def forget_stories(worker) -> None:
    """The books of the job to come alone."""
    worker = worker.worker  # vLLM hands over a wrapper, on which it would be set
    runtime = worker.kv_compression
    runtime.ledger = type(runtime.ledger)(runtime.block_bytes, runtime.stored and runtime.stored.store)


def count_published(worker) -> int:
    """Packed prefixes that rows may read."""
    return len(worker.kv_compression.state.directory)


def self_tested(worker) -> dict | None:
    """What the self-test of its start found, in numbers."""
    if (report := worker.worker.self_tested) is None:
        return None
    return {
        "failures": [str(failure) for failure in report.failures],
        "kernels": list(report.worst()),
        "left_out": report.left_out,
        "subject": report.subject,
    }


def run(job: dict, llm, tokens: list[int]) -> dict:
    """What became of the job's batches."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    ours = hasattr(scheduler, "compression")
    if ours:
        llm.collective_rpc(forget_stories)

    def preemptions():
        return next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")

    preempted = preemptions()
    result = {
        "tokens": [],
        "told": [],
        "samples": [],
        "free": [],
        "cached": [],
        "free_at_start": pool.get_num_free_blocks(),
    }
    for b, batch in enumerate(job["batches"]):
        if b in job.get("empty_before", ()):
            # What comes is found in the store, or not at all.
            assert all(llm.collective_rpc("kv_compression_flush", args=(60,))) and llm.reset_prefix_cache()
        ids, final, samples, free = [f"{b}-{r}" for r in range(len(batch))], {}, {}, []
        waiting = dict(zip(ids, batch, strict=True))
        while waiting or engine.has_unfinished_requests():
            for request_id, request in list(waiting.items()):
                if len(free) < request.get("after", 0):
                    continue
                del waiting[request_id]
                prompt = tokens[request["start"] : request["start"] + request["length"]]
                params = SamplingParams(
                    **{"temperature": 0, **request.get("sampling", {})},
                    max_tokens=request["max_tokens"],
                    ignore_eos=True,
                    extra_args=request["extra_args"],
                )
                engine.add_request(
                    request_id, {"prompt_token_ids": prompt}, params, priority=request.get("priority", 0)
                )
            for output in engine.step():
                final[output.request_id] = output
                for answer in output.outputs:  # of several answers a step tells of one
                    samples.setdefault(output.request_id, {})[answer.index] = list(answer.token_ids)
            free.append(pool.get_num_free_blocks())
            if len(free) == job.get("abort_after"):
                engine.abort_request(ids)
        result["told"].append([(final[i].kv_transfer_params or {}).get("kv_compression") for i in ids])
        result["tokens"].append([list(final[i].outputs[0].token_ids) for i in ids])
        result["samples"].append([[samples[i][n] for n in sorted(samples[i])] for i in ids])
        result["cached"].append([final[i].num_cached_tokens for i in ids])
        engine.step()  # the workers hear of what finished
        result["free"].append([*free, pool.get_num_free_blocks()])
    if ours:
        report = llm.collective_rpc("kv_compression_report", args=(1000,))[0]
        result["stats"], result["stories"] = report["stats"], report["newest"][::-1]
        result["in_store"] = all(llm.collective_rpc("kv_compression_flush", args=(60,)))
        result["compressions"] = [story["compression"] for story in result["stories"] if story["compression"]]
    result["scheduler"] = type(scheduler).__name__
    result["published"] = sum(llm.collective_rpc(count_published)) if ours else None
    result["self_tested"] = llm.collective_rpc(self_tested)[0] if ours else None
    result["preemptions"] = preemptions() - preempted
    return result


def tokens_of(text: str, llm) -> list[int]:
    """The text's tokens by the model's tokenizer; of a model that knows fewer, some that it knows."""
    from tokenizers import Tokenizer

    model = llm.llm_engine.vllm_config.model_config
    encoded = Tokenizer.from_file(str(Path(model.model) / "tokenizer.json")).encode(text)
    return [token % model.get_vocab_size() for token in encoded.ids]


def main() -> None:
    import pydoc_data.topics

    llm = job = None
    for line in sys.stdin:
        job = json.loads(line)
        if llm is None:
            llm = start(job)
            text = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
            tokens = tokens_of(text[:60000], llm)
        print(json.dumps(run(job, llm, tokens)), file=RESULT, flush=True)
    if job and ranks_of(job) == 1:
        os._exit(0)  # to take all of it apart would need seconds, and show nothing


if __name__ == "__main__":
    main()
