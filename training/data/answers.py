"""Records that hold several answers to one prompt: pairs for preferences, rewarded completions for policy optimisation.

Note: advantages. Of a completion among those of its prompt: (reward - mean) / (standard deviation + 1e-4), the deviation being the
sample's (2402.03300, sec. 4.1.2, with the constant that TRL adds). Groups of equal rewards teach nothing: their advantages are 0.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...errors import DataError
from .indexed import Kind

EPSILON = 1e-4
FIELDS = ("chosen", "rejected", "completions")
"""Fields that make a record one of these."""


class Pieces(Protocol):
    """A tokenizer, as far as it is used here (encode.Encoder)."""

    def prompt_ids(self, text: str) -> list[int]: ...
    def answer_ids(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids (int32) and which of them are targets (None: all)."""

    ids: np.ndarray
    mask: np.ndarray | None
    kind: Kind = Kind.DOCUMENTS
    first: int = 0
    """Of a pair: tokens of its first half."""
    scalars: tuple[float, float] = (0.0, 0.0)
    """Of a completion: reward and advantage."""


def has_answers(row: dict[str, Any]) -> bool:
    """Whether a record is a pair or a group of completions (whole or not)."""
    return any(row.get(name) is not None for name in FIELDS)


def answer_documents(pieces: Pieces, where: str, row: dict[str, Any]) -> list[Document]:
    """One pair, or one document per completion. DataError for what is missing or no number."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise _bad(where, f"{_kind_of(prompt)} in 'prompt'", "a string (render conversations with your chat template first)")
    if row.get("completions") is None:
        return [_pair(pieces, where, prompt, row)]
    if any(row.get(name) is not None for name in ("chosen", "rejected")):
        raise _bad(where, "'completions' beside 'chosen' or 'rejected'", "a pair, or a group of completions")
    return _completions(pieces, where, prompt, row["completions"])


def _pair(pieces: Pieces, where: str, prompt: str, row: dict[str, Any]) -> Document:
    halves = []
    for name in ("chosen", "rejected"):
        if not isinstance(row.get(name), str):
            raise _bad(where, f"{_kind_of(row.get(name))} in '{name}'", "'prompt', 'chosen' and 'rejected', three strings")
        halves.append(_answer(pieces, where, prompt, row[name], f"'{name}'"))
    ids, masks = (np.concatenate([half[column] for half in halves]) for column in range(2))
    return Document(ids, masks, Kind.PAIRS, first=len(halves[0][0]))


def _completions(pieces: Pieces, where: str, prompt: str, found: Any) -> list[Document]:
    if not isinstance(found, list) or len(found) < 2:
        what = f"{len(found)} of them" if isinstance(found, list) else _kind_of(found)
        raise _bad(where, f"{what} in 'completions'", "a list of two or more: an advantage is over the others of the group")
    rewards, out = [], []
    for number, entry in enumerate(found, 1):
        place = f"{where} completion {number}"
        text, reward = (entry.get("text"), entry.get("reward")) if isinstance(entry, dict) else (None, None)
        if not isinstance(text, str):
            raise _bad(place, f"{_kind_of(text)} in 'text'", "an object with a string 'text' and a number 'reward'")
        if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise _bad(place, "no reward" if reward is None else f"{reward!r} in 'reward'", "a finite number")
        rewards.append(float(reward))
        out.append(_answer(pieces, place, prompt, text, "'text'"))
    pairs = zip(out, rewards, advantages(rewards), strict=True)
    return [Document(ids, mask, Kind.COMPLETIONS, scalars=(reward, value)) for (ids, mask), reward, value in pairs]


def advantages(rewards: list[float]) -> list[float]:
    """Of two or more completions of one prompt (Note: advantages)."""
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (deviation + EPSILON) for reward in rewards]


def _answer(pieces: Pieces, where: str, prompt: str, text: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    first, second = pieces.prompt_ids(prompt), pieces.answer_ids(text)
    ids = np.array([*first, *second], dtype=np.int32)
    # The first token of all is no target: nothing is before it.
    mask = np.arange(len(ids)) >= max(len(first), 1)
    if not mask.any():
        raise _bad(where, f"no token to learn in {name}", "an answer that is not empty")
    return ids, mask


def _kind_of(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _bad(where: str, found: str, expected: str) -> DataError:
    return DataError(where, found=found, expected=expected, hint="mend it, or leave such records out with --skip-bad")
