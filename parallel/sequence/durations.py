"""Rows of shelf durations worth trying, from a relaxation small enough for dynamic programming.

As if each shelf took the next run of sequences in descending length, each sequence could be cut, and a share of a shelf's time and
memory were lost: then the best row of durations is a shortest path over positions in that order.
"""

from __future__ import annotations

import numpy as np

from .tables import Batch

RATIO = 1.07
"""Between durations tried."""
POSITIONS = 1024
"""Places a shelf may start at; more sequences are taken in runs."""


class Relaxation:
    """Work of every prefix of the sequences under each duration, for shortest paths with different losses."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.taus = _grid(batch)
        self.starts = np.unique(np.linspace(0, len(batch), min(len(batch), POSITIONS) + 1).astype(np.int64))
        tokens_before = np.concatenate([[0], np.cumsum(batch.lengths)])
        room = tokens_before[self.starts] + batch.cost.world_size * batch.cost.tokens_per_rank
        self.by_room = np.searchsorted(tokens_before, room, side="right") - 1
        self.spent, self.fits = zip(*(_work(batch, float(tau)) for tau in self.taus), strict=True)

        self.choices: list[np.ndarray] = []
        self.rests: list[np.ndarray] = []
        self.work_after = np.append(np.cumsum(batch.work[::-1])[::-1], 0.0)

    def suggested(self, lead: int) -> list[float]:
        """Durations that the rows found so far give a shelf whose longest sequence is at `lead`."""
        place = int(np.searchsorted(self.starts, lead, side="right")) - 1
        return [float(self.taus[choice[place]]) for choice in self.choices]

    def estimate(self, rem: np.ndarray) -> float:
        """Seconds that what is left may take: the relaxed row from its longest on, by the share of work that is still there."""
        place = int(np.searchsorted(self.starts, rem[0], side="right")) - 1
        rest = min(float(rest[place]) for rest in self.rests)
        return rest * float(self.batch.work[rem].sum()) / float(self.work_after[self.starts[place]])

    def durations(self, efficiency: float) -> tuple[float, ...]:
        """Shelves of the cheapest row if `efficiency` of a shelf's rank-seconds can be used, for the longest sequences first."""
        ends = np.stack([self._reach(i, efficiency) for i in range(len(self.taus))])
        price = self.batch.cost.beta_s + np.maximum(self.batch.cost.gather_s, self.taus)
        last = len(self.starts) - 1
        rest, choice = np.zeros(last + 1), np.zeros(last + 1, dtype=np.int64)
        for place in range(last - 1, -1, -1):
            to = ends[:, place]
            total = np.where(to > place, price + rest[to], np.inf)
            choice[place] = total.argmin()
            rest[place] = total[choice[place]]
        self.choices.append(choice)
        self.rests.append(rest)
        durations, place = [], 0
        while place < last and np.isfinite(rest[place]):
            durations.append(float(self.taus[choice[place]]))
            place = int(ends[choice[place], place])
        return tuple(durations)

    def _reach(self, i: int, efficiency: float) -> np.ndarray:
        """For each start, the index in `starts` up to which one shelf gets; its own where its first sequence does not fit."""
        spent, starts = self.spent[i], self.starts
        most = spent[starts] + efficiency * self.batch.cost.world_size * self.taus[i]
        reached = np.minimum(np.searchsorted(spent, most, side="right") - 1, self.by_room)
        ends = np.searchsorted(starts, np.maximum(reached, starts), side="right") - 1
        return np.where(self.fits[i][starts], ends, np.arange(len(starts)))


def _grid(batch: Batch) -> np.ndarray:
    """A grid of durations, from a shelf that only short sequences allow to the longest that can be of use."""
    exact = batch.times[0, int(batch.first[0]) :]
    mean = float(batch.work.sum()) / batch.cost.world_size / batch.num_shelves
    high = max(1.3 * float(exact[0]), 2 * mean)
    low = min(max(float(batch.fastest[-1]), mean / 30), high / RATIO)
    grid = np.geomspace(low, high, 2 + int(np.log(high / low) / np.log(RATIO)))
    return np.unique(np.concatenate([grid, exact[exact <= high]]))


def _work(batch: Batch, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """Rank-seconds of every prefix with the smallest degrees that meet tau, and which sequences any degree lets meet it (and one more)."""
    allowed = (np.arange(len(batch.degrees)) >= batch.first[:, None]) & (batch.times <= tau * (1 + 1e-12))
    fits, degree = allowed.any(axis=1), allowed.argmax(axis=1)
    work = np.where(fits, batch.times[np.arange(len(batch)), degree] * batch.degrees[degree], 0.0)
    return np.concatenate([[0.0], np.cumsum(work)]), np.append(fits, False)
