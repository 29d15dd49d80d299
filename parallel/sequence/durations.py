"""Rows of shelf durations worth trying, from a relaxation small enough for dynamic programming.

As if each shelf took the next run of sequences in descending length, each sequence could be cut, and a share of a shelf's time and
memory were lost: then the best row of durations is a shortest path over positions in that order.
"""

from __future__ import annotations

import numpy as np

from .tables import Batch

RATIO = 1.07
"""Between durations tried."""
POSITIONS = 4096
"""Places a shelf may start at; more sequences are taken in runs."""


def likely_durations(batch: Batch, efficiency: float) -> tuple[float, ...]:
    """Descending-length shelves of the cheapest row if `efficiency` of a shelf's rank-seconds can be used."""
    taus = _grid(batch)
    starts = np.unique(np.linspace(0, len(batch), min(len(batch), POSITIONS) + 1).astype(np.int64))
    ends = np.stack([_reach(batch, float(tau), starts, efficiency) for tau in taus])
    price = batch.cost.beta_s + np.maximum(batch.cost.gather_s, taus)
    rest = np.zeros(len(starts))
    choice = np.zeros(len(starts), dtype=np.int64)
    for place in range(len(starts) - 2, -1, -1):
        to = ends[:, place]
        total = np.where(to > place, price + rest[to], np.inf)
        choice[place] = total.argmin()
        rest[place] = total[choice[place]]
    found, place = [], 0
    while place < len(starts) - 1 and np.isfinite(rest[place]):
        found.append(float(taus[choice[place]]))
        place = int(ends[choice[place], place])
    return tuple(found)


def _grid(batch: Batch) -> np.ndarray:
    """From a shelf that only short sequences allow to the longest that can be of use."""
    longest = float(batch.times[0, int(batch.first[0])]) * 1.3
    mean = float(batch.work.sum()) / batch.cost.world_size / batch.num_shelves
    high, low = max(longest, 2 * mean), max(float(batch.fastest[-1]), mean / 30, 1e-12)
    grid = np.geomspace(min(low, high / RATIO), high, 2 + int(np.log(high / min(low, high / RATIO)) / np.log(RATIO)))
    exact = batch.times[0, int(batch.first[0]) :]
    return np.unique(np.concatenate([grid, exact[exact <= high]]))


def _reach(batch: Batch, tau: float, starts: np.ndarray, efficiency: float) -> np.ndarray:
    """For each start, the index in `starts` up to which one shelf of `tau` gets; its own where the first sequence does not fit."""
    allowed = (np.arange(len(batch.degrees)) >= batch.first[:, None]) & (batch.times <= tau * (1 + 1e-12))
    fits = allowed.any(axis=1)
    degree = allowed.argmax(axis=1)
    work = np.where(fits, batch.times[np.arange(len(batch)), degree] * batch.degrees[degree], 0.0)
    spent = np.concatenate([[0.0], np.cumsum(work)])
    held = np.concatenate([[0], np.cumsum(batch.lengths)])
    by_time = np.searchsorted(spent, spent[starts] + efficiency * batch.cost.world_size * tau, side="right") - 1
    by_room = np.searchsorted(held, held[starts] + batch.cost.world_size * batch.cost.tokens_per_rank, side="right") - 1
    reached = np.maximum(np.minimum(by_time, by_room), starts)
    ends = np.searchsorted(starts, reached, side="right") - 1
    first = np.append(fits, False)[starts]
    return np.where(first, ends, np.arange(len(starts)))
