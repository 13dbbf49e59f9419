"""How much can be left out before an answer changes? Notebook style: run it as a whole, or cell by cell in an editor.

vllm serve MODEL --kv-compression sculpt
export DOCUMENT=document.txt QUESTION="What happens to the ship?"  # ADDRESS=http://localhost:8000
python examples/compare_keep_ratios.py
"""

# %% A running server, a document of a thousand tokens or more, a question about it
import difflib
import os
from pathlib import Path

from openai import OpenAI

ADDRESS = os.environ.get("ADDRESS", "http://localhost:8000")
DOCUMENT = Path(os.environ["DOCUMENT"]).read_text(encoding="utf-8")
QUESTION = os.environ.get("QUESTION", "Summarise the text in three sentences.")
client = OpenAI(base_url=f"{ADDRESS}/v1", api_key="unused")
model = client.models.list().data[0].id


# %% One answer, and what it says of its compression
def ask(**settings):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}],
        temperature=0,
        max_tokens=120,
        extra_body={"vllm_xargs": settings},
    )
    return answer.choices[0].message.content, answer.kv_transfer_params["kv_compression"]


# %% The exact answer, then less and less of the cache
exact, _ = ask(kv_compression="none")
print(f"exact\n{exact}\n")
for keep_ratio in (0.7, 0.5, 0.3, 0.2, 0.1, 0.05):
    text, story = ask(kv_compression_keep_ratio=keep_ratio)
    alike = difflib.SequenceMatcher(None, exact.split(), text.split()).ratio()
    if not story["segments"]:
        print(f"keep ratio {keep_ratio}: {story['outcome']}, {story['reason']}")
        continue
    print(
        f"keep ratio {keep_ratio}: {story['entries_held']} entries in the place of "
        f"{story['tokens_found'] + story['tokens_sculpted']} tokens, held-out error {story['held_out_error']:.4f}, "
        f"{alike:.0%} of the words in the same place\n{text}\n"
    )
