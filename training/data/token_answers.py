"""Reads prompts and completions that are token ids already, as those who sampled them have them: nothing is tokenised again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .messages import bad_record, kind_of, shown

PROMPT_IDS, IDS = "prompt_ids", "ids"


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """A completion after its prompt, as token ids; no special token is added to either."""

    prompt: list[int]
    completion: list[int]

    def document(self, where: str, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32) and what is learnt of them (bool). DataError for an id outside the tokenizer's vocabulary."""
        ids = np.array([*self.prompt, *self.completion], dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if len(outside):
            raise bad_record(where, f"token id {outside[0]}", f"0 to {vocab_size - 1}, the tokenizer's vocabulary")
        return ids.astype(np.int32), np.arange(len(ids)) >= len(self.prompt)


def read_token_ids(where: str, row: dict[str, Any], name: str) -> list[int]:
    """The list of token ids in a field; DataError for anything else."""
    values = row.get(name)
    if not isinstance(values, list):
        raise bad_record(where, f"{kind_of(values)} in '{name}'", "a list of token ids")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 1 << 31:
            raise bad_record(where, f"{shown(value)} in '{name}'", "token ids, whole numbers")
    return values
