"""Pairs of whole conversations as texts: where their prompt ends, and what is refused."""

from __future__ import annotations

import pytest

from efflaunch.errors import DataError
from efflaunch.training.data.records import Exchange, Preference, read_record
from efflaunch.training.data.whole_texts import split_pair

ONE = "\n\nHuman: Two?\n\nAssistant:"
TWO = f"{ONE} Four.\n\nHuman: And three?\n\nAssistant:"
SPLIT = [
    (ONE + " yes", ONE + " no", ONE),
    (TWO + " yes, it is", TWO + " yes, it was", TWO),
    # Both go on differently from the first answer on.
    (ONE + " yes", ONE + " no", ONE),
    (ONE + " Four.", ONE + " Four. Or five.", ONE),
    (ONE + " \n\nAssistant", ONE + " \n\nAssist", ONE),
    (TWO + " same", TWO + " same", TWO),
]


@pytest.mark.parametrize(("chosen", "rejected", "prompt"), SPLIT)
def test_the_prompt_ends_at_the_last_turn_they_share(chosen: str, rejected: str, prompt: str) -> None:
    answers = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    assert split_pair("r", None, chosen, rejected) == (prompt, *answers)
    assert split_pair("r", prompt, chosen, rejected) == (prompt, *answers), "the prompt is not there twice"
    assert split_pair("r", prompt, *answers) == (prompt, *answers)
    expected = Preference(*(Exchange(prompt, answer) for answer in answers))
    for row in ({}, {"prompt": None}, {"prompt": prompt}):
        assert read_record("r", {**row, "chosen": chosen, "rejected": rejected}, "text") == expected


def test_answers_that_begin_as_a_prompt_of_another_kind_stay_as_they_are() -> None:
    assert split_pair("r", "Hi", "Hi there", "Hi!") == ("Hi", "Hi there", "Hi!")


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("yes", "no", "r: found nothing in 'prompt', and no turn of the assistant's in what 'chosen' and 'rejected' begin with"),
        (ONE + " yes", ONE.replace("Two", "Three") + " no", "found nothing in 'prompt', and no turn"),
        ("Human: a Assistant: b", "Human: a Assistant: c", "found nothing in 'prompt', and no turn"),
        (ONE + " no", TWO + " yes", "found a turn of the user's inside the answer in 'rejected'"),
    ],
)
def test_what_is_no_pair_is_named(chosen: str, rejected: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_pair("r", None, chosen, rejected)
