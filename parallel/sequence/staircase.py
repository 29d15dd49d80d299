"""The staircase bound in closed form, for a whole batch or for what a search has left.

No assumption on how cost grows is made: work is the least rank-seconds of each sequence over the degrees that hold it, tokens are
taken off densest work first, and durations in their own order. With a monotone cost all three orders are that of length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .tables import Batch


@dataclass(frozen=True, slots=True)
class Stairs:
    """Seconds below which the sequences cannot be done, without step_s, and how many micro-batches memory asks for."""

    rest_s: float
    shelves: int


def staircase(batch: Batch, rem: np.ndarray) -> Stairs:
    """T >= M beta + max_m [ sum_{i<=m} t(p(i)) + W(after m full shelves) / N ] for the sequences at `rem`.

    M: shelves that memory asks for. p(i): the first sequence that i - 1 shelves cannot hold with all before it, so the i-th
    longest shelf takes at least its fastest time. W: least work left when m shelves have taken their fill of the densest.
    """
    tokens = batch.lengths[rem].astype(np.float64)
    room = float(batch.cost.world_size * batch.cost.tokens_per_rank)
    shelves = int(-(-int(batch.lengths[rem].sum()) // int(room)))
    if not shelves:
        return Stairs(0.0, 0)
    work, fastest = batch.work[rem], batch.fastest[rem]
    steps = leads(tokens, fastest, room, shelves)
    left = _work_left(tokens, work, room, shelves)
    longest = float((np.concatenate([[0.0], np.cumsum(steps)]) + left / batch.cost.world_size).max())
    return Stairs(shelves * batch.cost.beta_s + max(longest, shelves * batch.cost.gather_s), shelves)


def leads(tokens: np.ndarray, fastest: np.ndarray, room: float, shelves: int) -> np.ndarray:
    """Least durations of the longest shelf, the second longest, ..."""
    if np.any(fastest[:-1] < fastest[1:]):
        order = np.argsort(-fastest, kind="stable")
        tokens, fastest = tokens[order], fastest[order]
    first = np.searchsorted(np.cumsum(tokens), np.arange(shelves) * room, side="right")
    return fastest[np.minimum(first, len(fastest) - 1)] * (first < len(fastest))


def _work_left(tokens: np.ndarray, work: np.ndarray, room: float, shelves: int) -> np.ndarray:
    """Least work after 0, 1, ... shelves have been filled with the densest, in fractions of sequences."""
    density = work / tokens
    if np.any(density[:-1] < density[1:]):
        order = np.argsort(-density, kind="stable")
        tokens, work = tokens[order], work[order]
    done = np.interp(np.arange(shelves + 1) * room, np.concatenate([[0.0], np.cumsum(tokens)]), np.concatenate([[0.0], np.cumsum(work)]))
    return np.maximum(0.0, work.sum() - done)
