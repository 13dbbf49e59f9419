"""What `kvsculpt eval` measures is what `vllm serve` runs: one prompt through both."""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvsculpt_vllm.calibration_file import SHIPPED, StoredMaps, read
from kvsculpt_vllm.evaluation.chain import Chain
from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.methods.base import surveyed
from kvsculpt_vllm.evaluation.model import EvaluationModel, load_tokenizer
from kvsculpt_vllm.models import fast_dtype
from kvsculpt_vllm.sculpt.chain import pieces
from kvsculpt_vllm.sculpt.effort import EFFORTS

pytestmark = pytest.mark.engine

LENGTH, ANSWER = 544, 8
KEEP = 0.5  # the maps have no say in a head's first quarter


@pytest.fixture(scope="module")
def calibration(model_path, tmp_path_factory):
    """The one that comes with the package, and random maps of all heads' queries, by which entries are ranked, too."""
    file = read(SHIPPED / f"{model_path.name}.json")
    heads = [(layer, head) for layer in range(file.num_layers) for head in range(file.num_kv_heads)]
    random = np.random.default_rng(0).normal(size=(len(heads), 3, 65, 64)) / 8
    path = tmp_path_factory.mktemp("calibration") / "with_maps.json"
    stored = StoredMaps.of(heads, np.eye(65, 64) + random, len(heads) * [1.0])
    file.model_copy(update={"query_maps": stored}).write(path)
    return path


def whole_model(model_path):
    """An engine of all its layers, in the dtype that servers choose."""
    return {"model": str(model_path), "dtype": fast_dtype(), "enable_prefix_caching": False}


def prompt_of(model_path, length):
    """The tokens that `engine_job.py` takes for a prompt that begins at 0."""
    topics = pydoc_data.topics.topics
    tokenizer, _ = load_tokenizer(model_path)
    return tokenizer(" ".join(topics[name] for name in sorted(topics))[:60000], verbose=False).input_ids[:length]


def test_the_engine_fits_what_the_harness_fits_and_answers_the_same(run_engine, model_path, calibration):
    config = {"method": "select", "keep_ratio": KEEP, "calibration": str(calibration)}
    settings = {"kv_compression": "sculpt", "kv_compression_effort": "fast"}
    request = {"start": 0, "length": LENGTH, "max_tokens": ANSWER, "extra_args": settings}
    engine = whole_model(model_path) | {"additional_config": {"kv_compression": config}}
    served = run_engine(engine=engine, batches=[[request]])
    (record,) = served["compressions"]

    prompt = prompt_of(model_path, LENGTH)
    answer = served["tokens"][0][0]
    # The engine compresses before the step that follows the prefill: its first token comes from the full cache.
    model = EvaluationModel.load(model_path, "cpu")
    context = Context(model, prompt, ANSWER, EFFORTS["fast"], block_size=32, window=64, sinks=4)
    plan = context.plan(KEEP)
    curves = read(calibration).whole
    fitted, plain = (
        surveyed("sculpt", calibration=given)(context.problems, plan, "adaptive", EFFORTS["fast"])(plan)
        for given in (curves, replace(curves, query_maps=None))
    )

    packed = plan.total // context.problems.num_problems
    assert record["blocks_after"] == packed + LENGTH // 32 - context.span_blocks
    # Maps change which entries are kept: an engine without them would be found.
    assert fitted.pages == plain.pages
    assert float(fitted.start_error.mean()) > 1.3 * float(plain.start_error.mean())
    # The engine computes in bfloat16, the harness in float32; another sample of queries would differ by much more.
    assert record["error_before"] == pytest.approx(float(fitted.start_error.mean()), rel=0.1)
    assert record["error_after"] == pytest.approx(float(fitted.error.mean()), rel=0.1)
    logits = model.continue_from(context.compressed_cache(fitted), answer[:-1], LENGTH)
    chosen = torch.tensor(answer[1:])
    best = logits.max(-1).values
    # Greedy up to rounding: where two tokens are that close, bfloat16 may prefer the other.
    assert (best - logits.gather(1, chosen[:, None])[:, 0] < 0.2).all()


def test_the_engine_makes_the_chain_that_the_harness_makes(run_engine, model_path):
    length, segment = 900, 256
    config = {"method": "sculpt", "keep_ratio": 0.3, "effort": "fast", "segment": segment, "max_stall_ms": 60_000}
    engine = whole_model(model_path) | {"additional_config": {"kv_compression": config}}
    request = {"start": 0, "length": length, "max_tokens": ANSWER, "extra_args": None}
    served = run_engine(engine=engine, batches=[[request]])
    (record,) = served["compressions"]

    model = EvaluationModel.load(model_path, "cpu")
    chain = Chain(model, prompt_of(model_path, length), EFFORTS["fast"], block_size=32, window=64, sinks=4)
    planned = list(pieces(length, 64, 32, 0.3, segment))
    # The engine finds the one that comes with the package.
    method = surveyed("sculpt", calibration=read(SHIPPED / f"{model_path.name}.json").whole)
    made = chain.make(planned, method, "adaptive")
    assert record["segments"] == len(made.segments) == 3
    assert record["span_tokens"] == 32 * sum(piece.blocks for piece in planned)
    assert record["entries_kept"] == 32 * sum(piece.packed_blocks for piece in planned)
    weights = [piece.blocks / planned[-1].end for piece in planned]
    for name, of in (("error_before", "start_error"), ("error_after", "error")):
        mean = sum(w * float(getattr(one, of).mean()) for w, one in zip(weights, made.segments, strict=True))
        assert record[name] == pytest.approx(mean, rel=0.1)
    answer = served["tokens"][0][0]
    logits = model.continue_from(made.cache, answer[:-1], length)
    best, chosen = logits.max(-1).values, logits.gather(1, torch.tensor(answer[1:])[:, None])[:, 0]
    assert (best - chosen < 0.2).all()
