"""An agent that reads a file part by part: each turn's prompt is the one before, the answer, and a tool's result.

vllm serve MODEL --kv-compression sculpt
python examples/agent_loop.py http://localhost:8000 document.txt

What the turns before have sculpted is found: it is neither computed nor sculpted again. With --kv-compression-store it
is found after a restart, too, and by other servers. A real agent lets the model choose its tools; this one always reads
on, so that the turns can be compared.
"""

import sys
import time
from pathlib import Path

from openai import OpenAI

INSTRUCTIONS = "You read a file with a tool, part by part. After each part say in one sentence what is new in it."
PART = 3000  # characters: some 750 tokens
TURNS = 8  # at most

address, text = sys.argv[1].rstrip("/"), Path(sys.argv[2]).read_text(encoding="utf-8")
client = OpenAI(base_url=f"{address}/v1", api_key="unused")
model = client.models.list().data[0].id


def read_part(number: int) -> str:
    """The tool."""
    return text[number * PART : (number + 1) * PART]


messages = [{"role": "system", "content": INSTRUCTIONS}]
print("turn  prompt   found  sculpted  from store  seconds")
for turn in range(TURNS):
    if not (part := read_part(turn)):
        break
    # Some models' chat templates have a role of its own for what a tool gives; every one has this.
    messages.append({"role": "user", "content": f"read_part({turn}) gave:\n{part}"})
    begin = time.perf_counter()
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=60)
    seconds = time.perf_counter() - begin
    said = answer.choices[0].message.content
    messages.append({"role": "assistant", "content": said})
    story = answer.kv_transfer_params["kv_compression"]
    print(
        f"{turn + 1:4}  {story['prompt_tokens']:6}  {story['tokens_found']:6}  {story['tokens_sculpted']:8}  "
        f"{story['tokens_read']:10}  {seconds:7.2f}  {said[:50]!r}"
    )
