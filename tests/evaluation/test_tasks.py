"""Samples of every task are made by their seed, hold one right answer, and are as long as was asked for."""

import re
from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from typer.main import get_command
from typer.testing import CliRunner

from kvsculpt_vllm.cli import app
from kvsculpt_vllm.evaluation.tasks import GROUPS, RULER, TASKS, expanded
from kvsculpt_vllm.evaluation.tasks.conversation import FACTS, TOLD, TURNS
from kvsculpt_vllm.evaluation.tasks.names import WORDS
from kvsculpt_vllm.evaluation.tasks.question import SCORE, Holds, score
from kvsculpt_vllm.evaluation.tasks.sample import samples

BY_STRINGS = sorted(TASKS.keys() - {"instructions"})
LENGTH, LONGEST_UNIT = 6000, 200


class Letters:
    """One token a character; a conversation is its turns between marks."""

    chat_template = "there"

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})

    def apply_chat_template(self, conversation, **_):
        turns = "".join(f"<{turn['role']}>{turn['content']}</{turn['role']}>" for turn in conversation)
        return f"{turns}<assistant>"


class NoTemplate(Letters):
    chat_template = None


class NoSystemPrompt(Letters):
    def apply_chat_template(self, conversation, **_):
        raise TemplateError("System role not supported")


TEXT = " ".join(f"This is sentence number {i}, and it says little." for i in range(700))


def make(name, length=LENGTH, count=2, seed=3, tokenizer=None):
    return samples(name, TASKS[name], TEXT, tokenizer or Letters(), length, count, seed)


def text_of(tokens):
    return "".join(map(chr, tokens))


def test_a_base_model_reads_what_its_texts_begin_with():
    plain, begun = (
        samples("niah", TASKS["niah"], TEXT, NoTemplate(), LENGTH, 1, 3, prefix)[0].context for prefix in ([], [7])
    )
    assert begun[0] == 7 and text_of(begun[1:])[:40] == text_of(plain)[:40] and len(begun) <= LENGTH
    chat = samples("niah", TASKS["niah"], TEXT, Letters(), LENGTH, 1, 3, [7])[0].context
    assert chat[0] != 7  # the template says it, where a model has one


@cache
def context_and_questions(name, seed):
    (sample,) = make(name, count=1, seed=seed)
    return text_of(sample.context), sample.questions


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_makes_the_same_samples_and_another_one_others(name):
    def tokens(seed):
        return [(sample.context, sample.asked, sample.expected) for sample in make(name, seed=seed)]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    first, second = tokens(3)
    assert first[0] != second[0]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [2500, LENGTH])
def test_a_context_is_as_long_as_was_asked_for(name, length):
    for sample in make(name, length):
        assert length - LONGEST_UNIT < len(sample.context) <= length
        asked = [len(asked) + one.limit for asked, one in zip(sample.asked, sample.questions, strict=True)]
        assert sample.following == max(asked)


@pytest.mark.parametrize("name", TASKS)
def test_the_question_comes_behind_the_context_and_gives_nothing_away(name):
    for sample in make(name):
        context = text_of(sample.context)
        assert re.search("<user>[^<]*$", context)  # the last turn is still open
        assert len({tuple(asked) for asked in sample.asked}) == len(sample.questions)
        for tokens, question in zip(sample.asked, sample.questions, strict=True):
            asked = text_of(tokens)
            assert asked == f"{question.asked}</user><assistant>{question.answer_starts}"
            assert question.asked not in context
            if isinstance(question.check, Holds):
                assert question.check(asked) == 0


@pytest.mark.parametrize("name", BY_STRINGS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_right_answer_scores_one_and_every_other_question_s_none(name, seed):
    context, questions = context_and_questions(name, seed)
    for question in questions:
        assert question.measures == SCORE
        assert question.check(question.expected) == 1
        assert question.check("I do not know.") == 0
        references = question.check.references
        assert len(set(references)) == len(references)
        assert all(reference in context for reference in references)
        assert question.check(references[0]) == pytest.approx(1 / len(references))
        others = [other.expected for other in questions if other is not question]
        assert all(question.check(other) == 0 for other in others)


@pytest.mark.parametrize("name", BY_STRINGS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_who_reads_the_context_comes_to_the_references_and_to_nothing_else(name, seed):
    context, questions = context_and_questions(name, seed)
    for question in questions:
        (solve,) = {solver for form, solver in SOLVERS.items() if re.search(form, question.asked)}
        assert sorted(solve(context, question.asked)) == sorted(question.check.references)


def _needles(context, asked):
    kind, names = re.search(r"magic (\w+?)s? for (.*) mentioned", asked).groups()
    told = re.findall(rf"The special magic {kind} for (\w+) is ([\w-]+)\.", context)
    return [value for name, value in told if name in names.replace(",", "").split()]


def _value(context, asked):
    key = re.search("the key (.*) mentioned", asked)[1]
    return re.findall(rf"The value of the key {key} is ([\w-]+)\.", context)


def _variables(context, asked):
    values = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", context):
        assert name not in values
        values[name] = values.get(value, value)
    return [name for name, value in values.items() if value == re.search(r"value (\d+)", asked)[1]]


def _most(words, asked):
    count = int(re.search(r"\d+", asked)[0])
    *chosen, (_, next_most) = Counter(words).most_common(count + 1)
    assert min(times for _, times in chosen) > next_most
    return [word for word, _ in chosen]


def _common(context, asked):
    return _most(re.findall(r"\d+\. (\w+)", context), asked)


def _frequent(context, asked):
    return _most(context.rpartition("<user>")[2].partition("\n\n")[2].split(), asked)


def _home(context, asked):
    name = re.search("does (.*) live", asked)[1]
    return re.findall(rf"{name} lives in the town of (\w+)\.", context)


def _employer(context, asked):
    name = re.search("that (.*) works for", asked)[1]
    (house,) = re.findall(rf"{name} works for the firm ([\w &]+)\.", context)
    return re.findall(rf"The firm {house} is in the town of (\w+)\.", context)


def _told_by_the_user(context, asked):
    (form,) = (told for told, question, *_ in FACTS if question == asked)
    return re.findall(re.escape(form).replace(r"\{\}", "(.+?)"), context)


def _note(context, asked):
    (note,) = re.findall(rf"The note called {asked.split()[4]} reads: ((?:The [a-z ]+ come\. ?)+)", context)
    return re.findall(r"The [a-z ]+ come\.", note)


def _list(context, asked):
    name = re.search(r"called (\w+),", asked)[1]
    (items,) = re.findall(rf"The list called {name}:\n((?:\d\. .*\n)+)", context)
    return items.splitlines()


def _code(context, asked):
    name = re.search(r"function (\w+)\.", asked)[1]
    (code,) = re.findall(rf"```python\n(def {name}\(.*?)```", context, re.DOTALL)
    compile(code, "", "exec")
    return code.removeprefix(f"def {name}(").splitlines()


SOLVERS = {
    "special magic": _needles,
    "value of the key": _value,
    "Find all variables": _variables,
    "most common words": _common,
    "most frequent words": _frequent,
    "town does": _home,
    "town is the firm": _employer,
    r"\b(my|I)\b": _told_by_the_user,
    "Repeat the note": _note,
    "Repeat the list": _list,
    "Repeat the code": _code,
}
"""How a reader finds the answers, by what is asked."""


def test_no_word_that_is_counted_is_a_part_of_another():
    assert not [(word, other) for word in WORDS for other in WORDS if word != other and word in other]


def test_common_words_are_ten_times_as_frequent_as_others_where_there_is_room():
    context = text_of(make("common_words", 60_000, count=1)[0].context)
    times = sorted(Counter(re.findall(r"\d+\. (\w+)", context)).values(), reverse=True)
    assert times[9] >= 100 and times[10] <= 0.11 * times[9]


def test_frequencies_of_words_fall_with_the_square_of_their_rank():
    context = text_of(make("frequent_words", 60_000, count=1)[0].context)
    times = sorted(Counter(context.partition("\n\n")[2].split()).values(), reverse=True)
    assert [times[0] / times[rank - 1] for rank in (2, 3, 4)] == pytest.approx([4, 9, 16], rel=0.02)


def test_facts_of_a_conversation_are_told_in_the_turns_that_they_are_said_to_be():
    (sample,) = make("conversation", count=1)
    turns = text_of(sample.context).split("<user>")[1:]
    assert len(turns) == TURNS + 1 and turns[-1] == ""
    told = [i for i, turn in enumerate(turns) for question in sample.questions if question.check(turn)]
    assert tuple(told) == TOLD


def test_many_questions_are_of_one_context():
    (sample,) = make("many_questions", count=1)
    assert len(sample.questions) == 8


def test_a_text_that_cannot_fill_the_context_is_refused():
    with pytest.raises(ValueError, match="--context: the text has too few tokens for so many contexts of 20000"):
        make("niah", 20000, count=2)


def test_a_context_that_is_too_short_for_a_task_is_refused():
    with pytest.raises(ValueError, match="--context: 300 tokens are too few for the task many_questions, it takes"):
        make("many_questions", 300)


def test_a_chat_template_without_system_prompts_is_told():
    assert make("niah", tokenizer=NoTemplate())
    with pytest.raises(ValueError, match=r"--tasks: the model's chat template refuses the conversation .*System role"):
        make("instructions", tokenizer=NoSystemPrompt())


def test_a_model_without_a_chat_template_reads_the_turns_one_after_the_other():
    (sample,) = make("instructions", count=1, tokenizer=NoTemplate())
    assert text_of(sample.context).startswith("You are the assistant of a library.")
    assert text_of(sample.asked[0]) == f"{sample.questions[0].asked}\n"


def test_groups_name_their_tasks_and_nothing_is_run_twice():
    assert len(RULER) == 13
    assert set(expanded(["all"])) == set(TASKS) >= {task for group in GROUPS.values() for task in group}
    assert expanded(["niah", "copying", "copy_list", "unheard-of"]) == ["niah", *GROUPS["copying"], "unheard-of"]


def test_an_unknown_task_is_told_with_what_is_allowed():
    found = CliRunner().invoke(app, ["eval", "--tasks", "niah,needles"])
    assert found.exit_code == 1
    assert "--tasks: got needles, allowed: niah, " in found.output
    assert "several at once: ruler, copying, all" in found.output


def test_the_help_names_every_task():
    options = {option.name: option.help for option in get_command(app).commands["eval"].params}
    assert not [name for name in (*TASKS, *GROUPS) if not re.search(rf"\b{name}\b", options["tasks"])]


def test_the_score_counts_the_references_that_are_there():
    assert score("It is ABC and 12.", ["abc", "12", "xyz", "0"]) == 0.5
