"""What `kvsculpt eval` measures is what `vllm serve` runs: one prompt through both."""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch

from kvsculpt_vllm.calibration_file import SHIPPED, read
from kvsculpt_vllm.evaluation.harness import Context
from kvsculpt_vllm.evaluation.methods.base import surveyed
from kvsculpt_vllm.evaluation.model import EvaluationModel, load_tokenizer
from kvsculpt_vllm.sculpt.effort import EFFORTS

pytestmark = pytest.mark.engine

LENGTH, ANSWER = 800, 8


def test_the_engine_fits_what_the_harness_fits_and_answers_the_same(run_engine, model_path):
    # As test_engine.py's, so that one engine serves both.
    config = {"method": "select", "keep_ratio": 0.3}
    settings = {"kv_compression": "sculpt", "kv_compression_effort": "fast"}
    request = {"start": 0, "length": LENGTH, "max_tokens": ANSWER, "extra_args": settings}
    engine = {"enable_prefix_caching": False, "additional_config": {"kv_compression": config}}
    served = run_engine(engine=engine, batches=[[request]])
    (record,) = served["compressions"]

    topics = pydoc_data.topics.topics
    tokenizer, _ = load_tokenizer(model_path)
    prompt = tokenizer(" ".join(topics[name] for name in sorted(topics))[:60000], verbose=False).input_ids[:LENGTH]
    answer = served["tokens"][0][0]
    # The engine compresses before the step that follows the prefill: its first token comes from the full cache.
    model = EvaluationModel.load(model_path, "cpu")
    context = Context(model, prompt, ANSWER, EFFORTS["fast"], block_size=32, window=64, sinks=4)
    plan = context.plan(0.3)
    # The engine finds the one that comes with the package.
    calibration = read(SHIPPED / f"{model_path.name}.json").whole
    fitted = surveyed("sculpt", calibration=calibration)(context.problems, plan, "adaptive", EFFORTS["fast"])(plan)

    packed = plan.total // context.problems.num_problems
    assert record["blocks_after"] == packed + LENGTH // 32 - context.span_blocks
    # The engine computes in bfloat16, the harness in float32; another sample of queries would differ by much more.
    assert record["error_before"] == pytest.approx(float(fitted.start_error.mean()), rel=0.1)
    assert record["error_after"] == pytest.approx(float(fitted.error.mean()), rel=0.1)
    logits = model.continue_from(context.compressed_cache(fitted), answer[:-1], LENGTH)
    chosen = torch.tensor(answer[1:])
    best = logits.max(-1).values
    # Greedy up to rounding: where two tokens are that close, bfloat16 may prefer the other.
    assert (best - logits.gather(1, chosen[:, None])[:, 0] < 0.2).all()
