"""Records that hold several answers to one prompt: pairs for preferences, rewarded completions for policy optimisation.

Note: advantages. Of a completion among those of its prompt: (reward - mean) / (standard deviation + 1e-4), the deviation being the
sample's (2402.03300, sec. 4.1.2, with the constant that TRL adds). Of several rewards it is of their weighted sum, as in TRL.
Groups of equal rewards teach nothing: their advantages are 0.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .indexed import Kind
from .messages import Chat, bad_record
from .records import Exchange, Group, Preference
from .rewards import total_reward
from .token_answers import TokenAnswer

EPSILON = 1e-4


class Answers(Protocol):
    """A tokenizer, as far as it is used here (encode.Encoder)."""

    @property
    def reward_weights(self) -> dict[str, float]: ...
    def answer(self, where: str, record: Exchange | Chat | TokenAnswer) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids (int32) and which of them are targets (None: all)."""

    ids: np.ndarray
    mask: np.ndarray | None
    kind: Kind = Kind.DOCUMENTS
    first: int = 0
    """Tokens of a pair's first half; 0 for other documents."""
    scalars: tuple[float, float] = (0.0, 0.0)
    """Reward and advantage of a completion; zeros for other documents."""


def answer_documents(encoder: Answers, where: str, record: Preference | Group) -> list[Document]:
    """One pair, or one document per completion. DataError for an answer without a token to learn."""
    if isinstance(record, Preference):
        halves = [_answer(encoder, where, record.chosen, "'chosen'"), _answer(encoder, where, record.rejected, "'rejected'")]
        ids, masks = (np.concatenate([half[column] for half in halves]) for column in range(2))
        return [Document(ids, masks, Kind.PAIRS, first=len(halves[0][0]))]
    out = [_answer(encoder, f"{where} completion {n}", entry, "'text'") for n, entry in enumerate(record.completions, 1)]
    rewards = [total_reward(f"{where} completion {n}", reward, encoder.reward_weights) for n, reward in enumerate(record.rewards, 1)]
    scored = zip(out, rewards, advantages(rewards), strict=True)
    return [Document(ids, mask, Kind.COMPLETIONS, scalars=(reward, value)) for (ids, mask), reward, value in scored]


def advantages(rewards: list[float]) -> list[float]:
    """The advantages of two or more completions of one prompt (Note: advantages)."""
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (deviation + EPSILON) for reward in rewards]


def _answer(encoder: Answers, where: str, record: Exchange | Chat | TokenAnswer, name: str) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = encoder.answer(where, record)
    # The first token of all is no target: nothing is before it.
    mask = mask & (np.arange(len(ids)) > 0)
    if not mask.any():
        raise bad_record(where, f"no token to learn in {name}", "an answer that is not empty")
    return ids, mask
