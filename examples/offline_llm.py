"""Compression in Python, without a server: python examples/offline_llm.py MODEL document.txt"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    model, document = sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8")
    llm = LLM(
        model=model,
        enforce_eager=True,
        max_model_len=4096,
        kv_cache_memory_bytes=1 << 28,  # enough for a small model; leave it out on a GPU
        additional_config={"kv_compression": {"method": "sculpt", "keep_ratio": 0.3, "effort": "fast"}},
    )
    tokenizer = llm.get_tokenizer()
    prompt = {"prompt_token_ids": tokenizer.encode(document)[:2000]}
    for extra in ({"kv_compression": "none"}, {}):
        (answer,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=60, extra_args=extra or None))
        print(f"--- {extra or 'sculpted'}\n{answer.outputs[0].text}")
    (report,) = llm.collective_rpc("kv_compression_report", args=(10,))
    for story in report["newest"]:
        print(story["request_id"], story["outcome"], story["reason"], story["compression"] or "")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
