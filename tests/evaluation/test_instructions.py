"""Instructions are verified by a program: kept is kept, broken is broken, and a secret that is told has leaked."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsculpt_vllm.evaluation.tasks.instructions import LANGUAGES, RUN, TRIED, instructions, language_of
from kvsculpt_vllm.evaluation.tasks.question import LEAKAGE, SCORE

SENTENCES = [f"Sentence {i} says little." for i in range(9)]
SEEDS = range(30)

SPOKEN = {
    "English": "The text is about the sea and a man in it.",
    "French": "Le texte est dans la mer et les hommes sont sur un bateau.",
    "German": "Der Text ist von dem Meer und die Leute sind auf den Booten.",
    "Italian": "Il testo è nel mare e gli uomini sono con le barche della città.",
    "Spanish": "El texto es del mar y los hombres con una barca por las olas.",
}


def prompt_and_questions(seed):
    draft = instructions(random.Random(seed), SENTENCES).draft(5)
    (role, prompt), _, (_, example), (_, document) = draft.turns
    assert draft.questions[0].check(example) == 1 and draft.questions[-1].check(example) == 0
    assert role == "system" and SENTENCES[4] in document and SENTENCES[5] not in document
    return prompt, draft.questions


def obedient(rules):
    """An answer that keeps all the rules."""
    told = " ".join(rule.told for rule in rules)
    (language,) = [name for name in LANGUAGES if f"in {name}." in told]
    word = told.partition('word "')[2].partition('"')[0]
    answer = f"{SPOKEN[language]} {word}"
    if "capital letters" in told:
        return answer.upper()
    if "Begin every answer" in told:
        return f"{told.partition('with the word ')[2].partition('.')[0]} {answer}"
    return f"- {answer}\n- {answer}"


@pytest.mark.parametrize("seed", SEEDS)
def test_an_answer_that_keeps_all_instructions_scores_one_and_one_that_keeps_none_scores_none(seed):
    _, questions = prompt_and_questions(seed)
    for question in (one for one in questions if one.measures == SCORE):
        rules = question.check.instructions
        assert len(rules) == 3
        assert question.check(obedient(rules)) == 1
        assert question.check(SPOKEN["English"]) == 0
        assert question.check("") == 0


def test_every_kind_of_instruction_is_given_to_some_seed():
    told = " ".join(prompt_and_questions(seed)[0] for seed in SEEDS)
    for part in ("Begin every", "capital letters", 'begins with "- "', *(f"in {name}." for name in LANGUAGES)):
        assert (part in told) == (part != "in English.")


@pytest.mark.parametrize("seed", SEEDS)
def test_the_secret_and_the_prompt_leak_and_refusals_and_obedient_answers_do_not(seed):
    prompt, questions = prompt_and_questions(seed)
    attacks = [one for one in questions if one.measures == LEAKAGE]
    assert [one.asked for one in attacks] == list(TRIED)
    rules = questions[0].check.instructions
    secret = prompt.partition("archive is ")[2].partition(".")[0]
    for attack in attacks:
        assert attack.check(f"It is {secret}!") == 1
        assert attack.check(prompt.upper()) == 1
        assert attack.check("I cannot tell you the key of the archive, it is a secret.") == 0
        assert attack.check(obedient(rules)) == 0
        assert attack.check("") == 0


@given(st.integers(0, 29), st.integers(0, 200), st.integers(1, 60))
def test_a_quotation_leaks_from_a_run_of_words_on(seed, begin, length):
    prompt, questions = prompt_and_questions(seed)
    words = [word for word in prompt.split() if word.isalpha() and word.islower()]
    quoted = prompt.split()[begin : begin + length]
    secret = prompt.partition("archive is ")[2].partition(".")[0]
    leaks = questions[-1].check(" ".join(quoted))
    if len(quoted) >= RUN + 2:  # at most two of them are no words, but a dash or a number
        assert leaks == 1
    elif len(quoted) < RUN - 1 and not any(secret in word for word in quoted):
        assert leaks == 0
    assert questions[-1].check(" ".join(reversed(words))) == 0


@pytest.mark.parametrize(("language", "text"), SPOKEN.items())
def test_a_language_is_told_by_its_frequent_words(language, text):
    assert language_of(text) == language


@pytest.mark.parametrize("text", ["", "Moby Dick", "der die", "12 34 56"])
def test_what_has_too_few_of_them_has_no_language(text):
    assert language_of(text) is None
