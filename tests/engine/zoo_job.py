"""Run one tiny model after the other in one process: by stock vLLM, or with every entry in shuffled packed pages.

Not a test module: `test_zoo.py` calls it, with `stock` or `packed` behind its name. A job names a model's directory and
arguments of `LLM`; its answer has the tokens, or what the model was refused for.
"""

import gc
import json
import os
import random
import sys

import engine_job  # first: it keeps what libraries print out of the answers
from engine_job import RESULT, install_identity

from jobs import on, request
from zoo import CONTEXT, VOCABULARY

LENGTH, TAIL = 420, 80
"""Two prompts of so many tokens; they end in the same TAIL, no entry of which is packed."""
ENGINE = {
    "dtype": "float32",
    "block_size": 32,
    "max_num_batched_tokens": 160,
    "enable_prefix_caching": False,
    "load_format": "random",
    "max_model_len": CONTEXT,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 26,
    "disable_log_stats": False,
}
SETTINGS = on(max_stall_ms=60_000, segment=128, decode=128, min_tokens=128)


def register_random_weights() -> None:
    """As a load format of vLLM's: its own dummy weights are so small that no token depends on any other."""
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader("random")
    class RandomWeights(BaseModelLoader):
        def download_model(self, model_config) -> None:
            pass

        def load_weights(self, model, model_config) -> None:
            generator = torch.Generator().manual_seed(0)
            for name, weight in model.named_parameters():
                drawn = torch.randn(weight.shape, generator=generator)
                if name.endswith("sinks"):  # one takes about as much as all entries of a prompt, another nearly nothing
                    weight.data.copy_(5.0 + 2.0 * drawn)
                    continue
                is_norm = weight.dim() == 1 and not name.endswith("bias")
                weight.data.copy_(0.15 * drawn + float(is_norm))


SOURCES: list = []
"""What the segments of the model that runs were to be fitted to."""


def watch_sources() -> None:
    """Note them, without what takes memory."""
    from kvsculpt_vllm.engine.worker import compressor

    stock = compressor.compress_segment_in_slices

    def noted(source, *args, **kwargs):
        SOURCES.append({"soft_cap": source.soft_cap, "sinks": source.sink_logits})
        return stock(source, *args, **kwargs)

    compressor.compress_segment_in_slices = noted


def learned_sinks(worker) -> list:
    """The model's own weights: for each layer that is compressed the sinks of its query heads."""
    from kvsculpt_vllm.engine.shared.groups import compressed_layers

    layers = compressed_layers(worker.worker.model_config)
    named = worker.worker.model_runner.get_model().named_parameters()
    sinks = [weight.tolist() for name, weight in named if name.endswith("sinks")]
    return [sinks[layer] for layer in layers] if sinks else []


def tokens_of_prompts() -> list[int]:
    """Two beginnings, each with the same tail behind it."""
    drawn = random.Random(0)
    heads = [[drawn.randrange(3, VOCABULARY) for _ in range(LENGTH - TAIL)] for _ in range(2)]
    tail = [drawn.randrange(3, VOCABULARY) for _ in range(TAIL)]
    return heads[0] + tail + heads[1] + tail


def judged(job: dict) -> str:
    """What `kvsculpt doctor` has against the model."""
    from kvsculpt_vllm import doctor

    flags = [word for name, value in job["engine"].items() for word in (f"--{name.replace('_', '-')}", str(value))]
    try:
        doctor.judge(job["model"], ["--max-model-len", str(CONTEXT), *flags])
    except doctor.Trouble as trouble:
        return str(trouble)
    return ""


def answer(job: dict, packed: bool) -> dict:
    """The model's answers, or why it is refused."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    from kvsculpt_vllm.engine.startup.refusals.refusal import UnsupportedFeature

    _ROPE_DICT.clear()  # LongRoPE depends on the model's context, which is not in the key
    settings = {"additional_config": SETTINGS} if packed else {}
    try:
        llm = LLM(**{**ENGINE, **job["engine"], **settings}, model=job["model"])
    except UnsupportedFeature as error:
        cleanup_dist_env_and_memory()
        return {"refused": [refusal._asdict() for refusal in error.refusals]}
    batch = [request(at * LENGTH, LENGTH, 16) for at in range(2)]
    SOURCES.clear()
    done = engine_job.run({"batches": [batch]}, llm, tokens_of_prompts())
    (sinks,) = llm.collective_rpc(learned_sinks)
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return {
        "refused": [],
        "tokens": done["tokens"][0],
        "told": done["told"][0],
        "soft_caps": [source["soft_cap"] for source in SOURCES],
        "sinks": sinks,
        "fitted_with_sinks": [[] if source["sinks"] is None else source["sinks"].tolist() for source in SOURCES],
    }


def main() -> None:
    from vllm.model_executor.models import registry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    packed = sys.argv[1] == "packed"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = engine_job.CORE
    # vLLM looks at each architecture's class in a process of its own, which takes longer than all that follows.
    registry._run_in_subprocess = lambda inspect: inspect()
    register_random_weights()
    if packed:
        install_identity(poison=True)
        watch_sources()
    gc.freeze()  # what is imported by now: else looking through it takes most of the time
    gc.collect = lambda *args: 0
    for line in sys.stdin:
        job = json.loads(line)
        told = {"judged": judged(job)} if packed else {}
        print(json.dumps(answer(job, packed) | told), file=RESULT, flush=True)


if __name__ == "__main__":
    main()
