"""Rewards of completions: one number, or several by name that are weighed and added up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import DataError
from efflaunch.tests.data.test_answers import made, tokenizer
from efflaunch.training.data.answers import advantages
from efflaunch.training.data.indexed import IndexedCorpus
from efflaunch.training.data.rewards import read_reward, total_reward

__all__ = ["tokenizer"]


def test_several_rewards_are_weighed_and_added_up() -> None:
    several = read_reward("here", {"correct": 1, "format": 0.5})
    assert several == {"correct": 1.0, "format": 0.5} and read_reward("here", 2) == 2.0
    assert (total_reward("here", several, {}), total_reward("here", 2.0, {})) == (1.5, 2.0)
    assert total_reward("here", several, {"format": -2.0}) == 0.0


WRONG: dict[str, tuple[Any, dict[str, float]]] = {
    "no reward": (None, {}),
    "found no reward; expected a finite number, or several by name": ({}, {}),
    "found True in 'reward'": (True, {}),
    "found '1' in 'reward.correct'": ({"correct": "1"}, {}),
    "found nan in 'reward.correct'": ({"correct": math.nan}, {}),
    "found a float in 'reward'; expected rewards by name, for the weights of correct": (1, {"correct": 2.0}),
    "found rewards format; expected also correct, which has a weight": ({"format": 1}, {"correct": 2.0}),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_reward_is_named(message: str) -> None:
    value, weights = WRONG[message]
    with pytest.raises(DataError) as error:
        total_reward("here", read_reward("here", value), weights)
    assert message in str(error.value)


def test_a_corpus_has_the_weighted_sums(tokenizer: str, tmp_path: Path) -> None:
    given = [{"correct": 1, "format": 0}, {"correct": 0, "format": 1}, {"correct": 1, "format": 1}]
    rows = [{"prompt": "Two?", "completions": [{"text": " four", "reward": reward} for reward in given]}]
    made(rows, tokenizer, tmp_path, reward_weights=(("format", 0.5),))
    corpus = IndexedCorpus(str(tmp_path / "c"))
    due = [1.0, 0.5, 1.5]
    scalars = corpus.columns()["scalars"]
    assert scalars is not None and scalars[::2].tolist() == due
    assert [corpus.advantage(number) for number in range(3)] == advantages(due)
