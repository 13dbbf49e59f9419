"""Tasks that ask for what stands in a compressed context, made by a seed, without any download.

The question comes after the compression, as the next turn of a conversation would: no method can know what will be
asked. To add a task, write what makes its plan (`sample.Maker`) and name it in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvsculpt_vllm.evaluation.tasks.answers import qa, qa_two_hops
from kvsculpt_vllm.evaluation.tasks.conversation import conversation
from kvsculpt_vllm.evaluation.tasks.copying import copy_code, copy_list, copy_verbatim
from kvsculpt_vllm.evaluation.tasks.instructions import instructions
from kvsculpt_vllm.evaluation.tasks.many import many_questions
from kvsculpt_vllm.evaluation.tasks.needles import (
    multikey,
    multikey_full,
    multikey_uuid,
    multiquery,
    multivalue,
    niah,
    niah_noise,
    niah_uuid,
)
from kvsculpt_vllm.evaluation.tasks.sample import Maker
from kvsculpt_vllm.evaluation.tasks.tracking import tracking
from kvsculpt_vllm.evaluation.tasks.words import common_words, frequent_words

RULER: dict[str, Maker] = {
    "niah": niah,
    "niah_noise": niah_noise,
    "niah_uuid": niah_uuid,
    "multikey": multikey,
    "multikey_full": multikey_full,
    "multikey_uuid": multikey_uuid,
    "multivalue": multivalue,
    "multiquery": multiquery,
    "tracking": tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "qa": qa,
    "qa_two_hops": qa_two_hops,
}
"""The 13 tasks of RULER (arXiv 2404.06654, table 5)."""

COPYING: dict[str, Maker] = {"copy_verbatim": copy_verbatim, "copy_list": copy_list, "copy_code": copy_code}

TASKS: dict[str, Maker] = {
    **RULER,
    "many_questions": many_questions,
    "instructions": instructions,
    "conversation": conversation,
    **COPYING,
}

GROUPS: dict[str, Sequence[str]] = {"ruler": tuple(RULER), "copying": tuple(COPYING), "all": tuple(TASKS)}
"""What names several tasks at once."""


def expanded(names: Iterable[str]) -> list[str]:
    """Put a group's tasks in the place of its name; what is named twice counts once."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))
