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


MOST_STEPS = 16
"""Steps of the tightened staircase that are looked at; any of them is a bound."""


def tightened(batch: Batch, limit_s: float) -> float:
    """A lower bound, without step_s, on every plan faster than `limit_s`: no shelf of such a plan lasts long.

    With durations in descending order, (m + 1) t[m+1] and the least durations of later shelves fit in limit_s - M beta. So what is
    left after m shelves has to run with degrees that keep to that duration, which may be more work than the smallest that memory
    allows. The maximum over m of the staircase with that work bounds every plan faster than limit_s; so does limit_s itself.
    """
    cost, shelves = batch.cost, batch.num_shelves
    tokens, room = batch.lengths.astype(np.float64), float(cost.world_size * cost.tokens_per_rank)
    steps = leads(tokens, batch.fastest, room, shelves)
    later = np.append(np.cumsum(np.maximum(steps, cost.gather_s)[::-1])[::-1], 0.0)
    fits = np.arange(len(batch.degrees)) >= batch.first[:, None]
    best = 0.0
    for m in range(min(shelves, MOST_STEPS)):
        longest = (limit_s - shelves * cost.beta_s - later[m + 1]) / (m + 1) * (1 + 1e-9)
        work = np.where(fits & (batch.times <= longest), batch.times * batch.degrees, np.inf).min(axis=1)
        # What no group does in that time was in one of the first m shelves, or there is no such plan: nothing is claimed of it.
        work = np.where(np.isfinite(work), work, batch.work)
        left = _work_left(tokens, work, room, shelves)[m] / cost.world_size
        best = max(best, float(steps[:m].sum()) + left)
    return min(limit_s, shelves * cost.beta_s + max(best, shelves * cost.gather_s))


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
