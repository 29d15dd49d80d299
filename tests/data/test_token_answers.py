"""Completions that are token ids already: as they are, with nothing added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import DataError
from efflaunch.tests.data.test_answers import made, tokenizer
from efflaunch.training.data.indexed import IndexedCorpus
from efflaunch.training.data.token_answers import TokenAnswer, read_token_ids

__all__ = ["tokenizer"]


def test_ids_are_taken_as_they_are(tokenizer: str, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [5, 6], "completions": [{"ids": [7, 8, 9], "reward": 1}, {"ids": [7], "reward": 0}]}]
    assert made(rows, tokenizer, tmp_path)["kind"] == "completions"
    corpus = IndexedCorpus(str(tmp_path / "c"))
    read = [(corpus.tokens(n, 0, int(corpus.lengths[n])).tolist(), corpus.mask(n, 0, int(corpus.lengths[n]))) for n in range(2)]
    assert [ids for ids, _ in read] == [[5, 6, 7, 8, 9], [5, 6, 7]]
    assert [mask.tolist() for _, mask in read if mask is not None] == [[False, False, True, True, True], [False, False, True]]


WRONG: dict[str, dict[str, Any]] = {
    "found nothing in 'ids'; expected a list of token ids": {"completions": [{"text": "a", "reward": 1}, {"ids": [1], "reward": 0}]},
    "found 'x' in 'ids'; expected token ids": {"completions": [{"ids": ["x"], "reward": 1}, {"ids": [1], "reward": 0}]},
    "found token id 99999; expected 0 to": {"completions": [{"ids": [99999], "reward": 1}, {"ids": [1], "reward": 0}]},
    "no token to learn in 'text'": {"completions": [{"ids": [], "reward": 1}, {"ids": [1], "reward": 0}]},
    "found a prompt beside 'prompt_ids'": {"prompt": "a"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_answer_is_named(tokenizer: str, tmp_path: Path, message: str) -> None:
    row = {"prompt_ids": [5], "completions": [{"ids": [7], "reward": 1}, {"ids": [8], "reward": 0}]} | WRONG[message]
    with pytest.raises(DataError) as error:
        made([row], tokenizer, tmp_path)
    assert message in str(error.value)


def test_fields_are_lists_of_whole_numbers() -> None:
    assert read_token_ids("here", {"ids": [1, 2]}, "ids") == [1, 2]
    ids, mask = TokenAnswer([1], [2]).document("here", 3)
    assert (ids.tolist(), mask.tolist(), str(ids.dtype)) == ([1, 2], [False, True], "int32")
