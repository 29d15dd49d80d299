"""The shelf planner: a step is a row of shelves (micro-batches), and a plan is little more than how long each shelf is.

Given a duration, `fill` packs a shelf longest-first with the narrowest groups that meet it. So the search is over durations alone:
a beam over those the longest remaining sequence suggests, scored by cost so far plus the staircase bound of the rest; equal shelves by
bisection for what remains of every beam state; then random changes of single durations. Effort is counted in sequences looked at,
never in time, so the same batch and budget give the same plan on any machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .durations import Relaxation
from .staircase_bound import staircase
from .tables import Batch, Shelf

FILL_WORK = 100
"""What starting a shelf counts, in sequences looked at."""
MOST_SHELVES = 24
"""Above this many micro-batches the beam is too deep to pay: only equal shelves and random changes are tried."""
EFFICIENCIES = (0.97, 0.93, 1.0, 0.89, 0.95, 0.91)
"""Shares of a shelf's rank-seconds the relaxation may use."""
BEAM_SHARE = 0.8
"""Share of the budget for the beam and all before it; the rest goes to random changes."""
ENOUGH = 1e-3
"""A plan this close to the bound, as a share, ends the search."""
STRETCH = ((1.0, 1.1, 1.45), (1.0, 1.04, 1.12, 1.3, 1.7), (1.0, 1.03, 1.08, 1.16, 1.3, 1.6, 2.2))
"""Durations tried for a shelf, over what its longest sequence takes; finer as the beam widens."""


@dataclass(frozen=True, slots=True)
class State:
    """Some shelves done: seconds so far, places left, and the durations that were asked for."""

    seconds: float
    rem: Any
    taus: tuple[float, ...]
    score: float = 0.0


class ShelfSearch:
    """Looks for durations within `budget` units of work. `limit_s`: the best plan known from elsewhere; `enough_s`: a lower bound.

    All seconds are without step_s. `expired` says whether the wall clock ends the search; it should hardly ever.
    """

    def __init__(
        self, batch: Batch, budget: int, limit_s: float, *, enough_s: float = 0.0, expired: Callable[[], bool] | None = None
    ) -> None:
        self.batch, self.budget, self.best_s, self.enough_s = batch, budget, limit_s, enough_s * (1 + ENOUGH)
        self.taus: tuple[float, ...] = ()
        self.spent, self.improved = 0, False
        self.expired = expired
        self.relaxed: Relaxation | None = None

    def run(self, first_taus: tuple[float, ...] = ()) -> list[Shelf] | None:
        """The best shelves found, or None where nothing beat the limit. `first_taus`: durations of a plan that exists."""
        start = State(0.0, self.batch.everything(), ())
        if first_taus:
            self._follow(start, first_taus)
            if not self.taus:
                # Nothing is better yet, but something has to be changed: the known plan is where random changes start.
                self.taus = first_taus
        self._equal(start)
        self._likely(start)
        if self.batch.num_shelves <= MOST_SHELVES:
            self._beam(start)
        self._perturb(start)
        return self._shelves() if self.improved else None

    def _fill(self, rem: Any, tau: float) -> tuple[Any, float]:
        before = self.batch.looked
        # Never less than the longest sequence takes at its fastest: a shelf that holds nothing would never end the search.
        left, load, _ = self.batch.run(self.batch.fill, rem, max(tau, float(self.batch.fastest[rem[0]])))
        self.spent += self.batch.looked - before + FILL_WORK
        return left, self.batch.shelf_s(load)

    def _over(self, share: float = 1.0) -> bool:
        if self.best_s <= self.enough_s or self.spent >= share * self.budget:
            return True
        return self.expired is not None and self.expired()

    def _keep(self, seconds: float, taus: tuple[float, ...]) -> None:
        # By more than rounding: else sums in another order pass for progress, and random changes never settle.
        if seconds < self.best_s * (1 - 1e-12):
            self.best_s, self.taus, self.improved = seconds, taus, True

    def _likely(self, start: State) -> None:
        """Rows of durations from the relaxation, stretched until their number of shelves suffices."""
        relaxed = self.relaxed = Relaxation(self.batch)
        for efficiency in EFFICIENCIES:
            taus = relaxed.durations(efficiency)
            low, high = 0.97, None
            stretch = low
            for _ in range(7):
                if not taus or self._over(0.4):
                    return
                if self._row_fits(start, tuple(tau * stretch for tau in taus)):
                    high = stretch
                else:
                    low = stretch
                stretch = low * 1.03 if high is None else (low + high) / 2

    def _row_fits(self, state: State, taus: tuple[float, ...]) -> bool:
        """Whether so many shelves more hold the rest; kept where that is the best yet."""
        rem, seconds = state.rem, state.seconds
        for done, tau in enumerate(taus, 1):
            rem, took = self._fill(rem, tau)
            seconds += took
            if not len(rem):
                self._keep(seconds, (*state.taus, *taus[:done]))
                return True
        return False

    def _beam(self, start: State) -> None:
        width = 1
        for level in range(8):
            states = [start]
            while states and not self._over(BEAM_SHARE):
                successors = [after for state in states for after in self._successors(state, STRETCH[min(level, 2)])]
                successors.sort(key=lambda state: (state.score, len(state.rem)))
                states = successors[:width]
                for state in states:
                    self._equal(state)
            width *= 2
            if self._over(BEAM_SHARE):
                return

    def _successors(self, state: State, stretch: Sequence[float]) -> Iterator[State]:
        """One shelf more, of every duration worth trying; finished plans are kept aside instead."""
        lead, batch = int(state.rem[0]), self.batch
        asked = [tau * factor for tau in batch.times[lead, int(batch.first[lead]) :].tolist() for factor in stretch]
        suggested = self.relaxed.suggested(lead) if self.relaxed is not None else []
        tried: list[float] = []
        for tau in [*suggested, *asked]:
            if self._over(BEAM_SHARE) or any(abs(tau / other - 1) < 0.01 for other in tried):
                continue
            tried.append(tau)
            rem, seconds = self._fill(state.rem, tau)
            after, taus = state.seconds + seconds, (*state.taus, tau)
            if not len(rem):
                self._keep(after, taus)
                continue
            # The staircase is a bound: a state it rules out has no plan below the best. The relaxation only ranks the others.
            score = after + staircase(batch, np.asarray(rem)).rest_s
            if score < self.best_s:
                if self.relaxed is not None and self.relaxed.rests:
                    score = max(score, after + self.relaxed.estimate(np.asarray(rem)))
                yield State(after, rem, taus, score)

    def _equal(self, state: State) -> None:
        """What is left on shelves of one duration, the shortest that suffices, for the fewest shelves and one more."""
        rem = np.asarray(state.rem)
        batch = self.batch
        tokens = int(batch.lengths[rem].sum())
        fewest = max(1, -(-tokens // (batch.cost.world_size * batch.cost.tokens_per_rank)))
        area = float(batch.work[rem].sum()) / batch.cost.world_size
        for shelves in (fewest, fewest + 1):
            least = max(area / shelves, float(batch.fastest[rem[0]]))
            # Memory may fill a shelf long before its duration is used: only work is sure to be spent.
            if state.seconds + shelves * batch.shelf_s(area / shelves) < self.best_s and not self._over():
                self._bisect(state, shelves, least)

    def _bisect(self, state: State, shelves: int, low: float) -> None:
        # Upwards in growing steps until it suffices, then halved: packing is not monotone in the duration, so that what is
        # kept is the best plan seen (_row_fits), whatever the interval ends at.
        high, step, enough = low, 1.03, False
        for _ in range(16):
            if (enough and high - low < 0.004 * high) or self._over():
                return
            middle = (low + high) / 2 if enough else high
            if self._row_fits(state, (middle,) * shelves):
                enough, high = True, middle
            elif enough:
                low = middle
            else:
                low, high, step = middle, middle * step, step * 1.25
                if state.seconds + shelves * self.batch.shelf_s(high) > 2.5 * self.best_s:
                    return

    def _perturb(self, start: State) -> None:
        """Random changes of one or two durations; the shelves before the first change are not packed again."""
        chance = random.Random(1)
        states, taus = self._replay(start), self.taus
        while taus and not self._over():
            changed, first = _changed(taus, chance)
            before = self.best_s
            self._follow(states[first], changed)
            if self.best_s < before:
                states, taus = self._replay(start), self.taus

    def _replay(self, start: State) -> list[State]:
        """The states before each shelf of the best plan."""
        states = [start]
        for tau in self.taus:
            rem, seconds = self._fill(states[-1].rem, tau)
            states.append(State(states[-1].seconds + seconds, rem, (*states[-1].taus, tau)))
        return states

    def _follow(self, state: State, taus: tuple[float, ...]) -> None:
        """Resume from `state` with the durations after its own, the last one repeated as long as something is left."""
        rem, seconds, done = state.rem, state.seconds, list(taus[: len(state.taus)])
        while len(rem) and seconds < self.best_s:
            tau = taus[min(len(done), len(taus) - 1)]
            rem, took = self._fill(rem, tau)
            seconds += took
            done.append(tau)
        if not len(rem):
            self._keep(seconds, tuple(done))

    def _shelves(self) -> list[Shelf]:
        """The best durations packed once more, each shelf squeezed."""
        batch, rem, shelves = self.batch, self.batch.everything(), []
        for tau in self.taus:
            left, load, groups = batch.run(batch.fill, rem, max(tau, float(batch.fastest[rem[0]])))
            shelves.append(squeezed(batch, batch.shelf(rem, groups, load)))
            rem = left
        return shelves


def _changed(taus: tuple[float, ...], chance: random.Random) -> tuple[tuple[float, ...], int]:
    """Durations with one or two of them changed, and the place of the first change."""
    new, place = list(taus), chance.randrange(len(taus))
    small = chance.random() * chance.random()
    new[place] *= 1 - 0.15 * small if chance.random() < 0.5 else 1 + 0.2 * small
    first = place
    if len(new) > 1 and chance.random() < 0.3:
        other = chance.randrange(len(new))
        new[other] *= 1 - 0.2 * (chance.random() - 0.5)
        first = min(place, other)
    return tuple(new), first


def squeezed(batch: Batch, shelf: Shelf) -> Shelf:
    """The shelf's sequences packed to the shortest duration that bisection finds, never longer than they were."""
    members = shelf.members
    area = float(batch.work[members].sum()) / batch.cost.world_size
    low, high, best = max(area, float(batch.fastest[members].max())), shelf.load_s, shelf
    rem = members if batch.is_compiled else members.tolist()
    for _ in range(12):
        if high - low < 0.002 * high:
            break
        middle = (low + high) / 2
        left, load, groups = batch.run(batch.fill, rem, middle)
        if len(left):
            low = middle
            continue
        # The packing's own load, which may be well below the duration that was allowed.
        high = min(high, load)
        if load < best.load_s:
            best = batch.shelf(rem, groups, load)
    return best
