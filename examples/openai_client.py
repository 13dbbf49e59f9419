"""Each request chooses how its prompt's KV cache is compressed. Start a server first:

vllm serve MODEL --kv-compression sculpt
python examples/openai_client.py http://localhost:8000 document.txt "What does it say about whales?"
"""

import sys
from pathlib import Path

from openai import OpenAI

address, document, question = sys.argv[1].rstrip("/"), Path(sys.argv[2]).read_text(encoding="utf-8"), sys.argv[3]
client = OpenAI(base_url=f"{address}/v1", api_key="unused")
model = client.models.list().data[0].id

for settings in (
    {"kv_compression": "none"},
    {},  # what the server is set to
    {"kv_compression_keep_ratio": 0.1, "kv_compression_effort": "thorough"},
):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{document}\n\n{question}"}],
        temperature=0,
        max_tokens=100,
        extra_body={"vllm_xargs": settings},
    )
    story = answer.kv_transfer_params["kv_compression"]
    print(f"--- {settings or 'the default'}: {story['outcome']} {story['reason']}")
    if story["segments"]:
        packed = story["tokens_found"] + story["tokens_sculpted"]
        print(
            f"    {packed} of {story['prompt_tokens']} tokens in {story['segments']} segments "
            f"({story['tokens_found']} found), {story['entries_held']} entries in their place, "
            f"held-out error {story['held_out_error']:.4f}"
        )
    print(answer.choices[0].message.content)
