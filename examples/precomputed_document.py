"""Questions about a document that was sculpted before its server was started. In this order:

python examples/precomputed_document.py document.txt > document.jsonl
kvsculpt precompute document.jsonl --model MODEL --store store
vllm serve MODEL --kv-compression sculpt --kv-compression-store store --kv-compression-store-mode read
python examples/precomputed_document.py document.txt http://localhost:8000 "Who is Ahab?" "What is the ship called?"
"""

import json
import sys
import time
from pathlib import Path

from openai import OpenAI


def messages_about(document: str) -> list[dict[str, str]]:
    """What every prompt begins with. The question comes behind it: what is found is found by its tokens."""
    return [{"role": "system", "content": f"Answer from this document.\n\n{document}"}]


def main() -> None:
    beginning = messages_about(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if len(sys.argv) < 3:
        print(json.dumps(beginning))
        return
    client = OpenAI(base_url=f"{sys.argv[2].rstrip('/')}/v1", api_key="unused")
    model = client.models.list().data[0].id

    def ask(question: str, max_tokens: int):
        messages = [*beginning, {"role": "user", "content": question}]
        return client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=max_tokens)

    for question in sys.argv[3:]:
        begin = time.perf_counter()
        first = ask(question, max_tokens=1)  # streamed answers do not tell how their prompt was compressed
        seconds = time.perf_counter() - begin
        story = first.kv_transfer_params["kv_compression"]
        print(f"--- {question}")
        print(
            f"    {seconds:.2f} s to the first token: of {story['prompt_tokens']} tokens {story['tokens_found']} were "
            f"found sculpted, {story['tokens_read']} of them in the store; {story['segments']} segments hold "
            f"{story['entries_held']} entries, held-out error {story['held_out_error']:.4f}"
        )
        print(ask(question, max_tokens=100).choices[0].message.content)


if __name__ == "__main__":
    main()
