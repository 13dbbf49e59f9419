"""Which requests of the engine belong to an id that a client knows."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vllm import envs

_SUFFIX = "-[0-9a-f]{8}"  # makes a client's id unique: `InputProcessor.assign_request_id`
_ANSWER = r"(?:\d+_)?"  # in front, where several answers are asked for: `ParentRequest.get_child_info`
_BEAM = r"(?:-[0-9a-f]{16}-beam-\d+)?"  # each step of each beam is a request

_SEVERAL = {
    "cmpl-": r"-\d+",  # prompts
    "generative-scoring-": r"-\d+",  # items
    "decision-": r"-\d+",  # questions
    "transcribe-": r"-\d+",  # chunks of audio
    "translate-": r"-\d+",
    "generate-tokens-": None,
}
"""How endpoints number the requests that they make of one, by the beginning of its id; None if they make one only."""
_SEVERAL_ELSE = r"_\d+"  # conversations of a batched chat; turns of a response, whose id may be anything


def find(client_id: str, engine_ids: Iterable[str]) -> list[str]:
    """Those of the engine's ids that an id means: itself, else the request of that name, else what was made of it.

    Where one name is another with a number, as a client may choose it, the request of that very name comes first.
    """
    known = list(engine_ids)
    suffix = "" if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION else _SUFFIX
    name, number = re.escape(client_id), _number(client_id)
    forms = [name, f"{_ANSWER}{name}{_BEAM}{suffix}"]
    if number is not None:
        # Only what numbers its prompts gives several answers to each.
        answer = _ANSWER if number.startswith("-") else ""
        forms.append(f"{answer}{name}{number}{_BEAM}{suffix}")
    for form in map(re.compile, forms):
        if found := [engine_id for engine_id in known if form.fullmatch(engine_id)]:
            return found
    return []


def _number(client_id: str) -> str | None:
    if client_id.isdecimal():  # of `LLM`, which counts its requests; `0_5` is the first answer of 5
        return None
    return next((number for begin, number in _SEVERAL.items() if client_id.startswith(begin)), _SEVERAL_ELSE)
