"""The search behind `plan_arena`: twelve greedy placements, then local searches from the best few of them in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .place import BEST, FIRST, Kernels
from .trace import Trace, round_up

MAX_PAIRS = 30_000_000
"""Above it only the ways that need no lists of neighbours are tried (4 bytes twice for each pair)."""
NUM_CLIMBERS = 4
SLICE = 4_000_000
"""Work between two looks at the clock."""
GAPS = {FIRST: "lowest gap", BEST: "tightest gap"}


@dataclass(slots=True)
class _Start:
    """A greedy placement that local search may start from."""

    height: int
    name: str
    fit: int
    order: np.ndarray


class PlacementSearch:
    """One planning: arrays in units of the sizes' common divisor, and the best placement so far.

    best, best_offsets: its height and addresses in units; method: what found it; work: neighbours looked at.
    """

    def __init__(self, trace: Trace, alignment: int, budget: Budget, kernels: Kernels, cancelled: Callable[[], bool]) -> None:
        rounded = [round_up(size, alignment) for size in trace.sizes]
        self.unit = math.gcd(*rounded) if rounded else 1
        self.sizes = np.array([size // self.unit for size in rounded], dtype=np.int64)
        self.births, self.deaths = np.array(trace.births, dtype=np.int64), np.array(trace.deaths, dtype=np.int64)
        self.live = np.array(trace.live_bytes(alignment), dtype=np.int64) // self.unit
        self.lower = int(self.live.max(initial=0))
        self.best, self.best_offsets, self.method, self.work = -1, np.zeros(0, dtype=np.int64), "nothing to place", 0
        self._events = event_numbers(self.births, self.deaths)
        self._kernels, self._budget, self._cancelled, self._began = kernels, budget, cancelled, time.monotonic()
        self._starts: list[_Start] = []
        self._rows = self._neighbours = np.zeros(0, dtype=np.int64)

    def run(self, seed: int) -> None:
        for fit in GAPS:
            self._sweep(fit, backward=False)
            self._sweep(fit, backward=True)
        if self._ended() or self._kernels.count_pairs(self._events) > MAX_PAIRS:
            return
        self._find_neighbours()
        for name, order in self._orders():
            for fit in GAPS:
                self._place(name, order, fit)
                if self._ended():
                    return
        self._climb(seed)

    def _ended(self) -> bool:
        late = time.monotonic() - self._began > self._budget.wall_s or self._cancelled()
        return self.best == self.lower or self.work >= self._budget.work or late

    def _keep(self, height: int, offsets: np.ndarray, method: str) -> None:
        if self.best < 0 or height < self.best:
            self.best, self.best_offsets, self.method = height, offsets.copy(), method

    def _sweep(self, fit: int, *, backward: bool) -> None:
        """Every block at its birth, or backwards in time at its death, beside what lives then."""
        n = len(self.sizes)
        offsets, space = np.full(n, -1, dtype=np.int64), (np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64))
        height, work = self._kernels.sweep(-self._events[::-1] if backward else self._events, fit, self.sizes, offsets, *space)
        self.work += int(work)
        name = f"in order of {'death, backwards' if backward else 'birth'}"
        order = np.lexsort((-self.births, -self.deaths)) if backward else np.argsort(self.births, kind="stable")
        self._starts.append(_Start(int(height), name, fit, order))
        self._keep(int(height), offsets, f"{name}, {GAPS[fit]}")

    def _place(self, name: str, order: np.ndarray, fit: int) -> None:
        offsets = np.full(len(order), -1, dtype=np.int64)
        height = self._put(order, fit, offsets)
        self._starts.append(_Start(height, f"by {name}", fit, order))
        self._keep(height, offsets, f"by {name}, {GAPS[fit]}")

    def _put(self, order: np.ndarray, fit: int, offsets: np.ndarray) -> int:
        limit = int(self.sizes.sum())
        height, work = self._kernels.put_all(order, 0, fit, limit, self.sizes, self._rows, self._neighbours, offsets, self._space())
        self.work += int(work)
        return int(height)

    def _space(self) -> tuple[np.ndarray, ...]:
        return tuple(np.zeros(len(self.sizes), dtype=np.int64) for _ in range(3))

    def _find_neighbours(self) -> None:
        n, none = len(self.sizes), np.zeros(0, dtype=np.int32)
        counts, live, where = (np.zeros(n, dtype=np.int64) for _ in range(3))
        self._rows = np.zeros(n + 1, dtype=np.int64)
        self._kernels.fill_pairs(self._events, self._rows, none, counts, live, where)
        self._rows[1:] = np.cumsum(counts)
        self._neighbours = np.zeros(int(self._rows[-1]), dtype=np.int32)
        counts[:] = 0
        self._kernels.fill_pairs(self._events, self._rows, self._neighbours, counts, live, where)
        self.work += 2 * len(self._neighbours)

    def _orders(self) -> list[tuple[str, np.ndarray]]:
        """Four orders beside birth and death, which the sweeps took."""
        life = self.deaths - self.births
        crowd = most_live(self.live, self.births, self.deaths)
        return [
            ("size", np.lexsort((self.births, -life, -self.sizes))),
            ("lifetime", np.lexsort((self.births, -self.sizes, -life))),
            ("size x lifetime", np.lexsort((self.births, -self.sizes * life))),
            ("crowding, then lifetime", np.lexsort((self.births, -self.sizes, -life, -crowd))),
        ]

    def _climb(self, seed: int) -> None:
        """Local search from several placements, a slice of work each in turn: which start leads on does not show in its height."""
        starts = sorted(self._starts, key=lambda start: start.height)
        names = {start.name: start for start in reversed(starts)}
        chosen = sorted(names.values(), key=lambda start: start.height)[:NUM_CLIMBERS]
        climbers = [_Climber(self, start, seed + index) for index, start in enumerate(chosen)]
        while not self._ended():
            for climber in climbers:
                climber.go(min(SLICE, self._budget.work - self.work))
                if self._ended():
                    break


class _Climber:
    """One local search: the order it stands at, and the lowest it has seen."""

    def __init__(self, search: PlacementSearch, start: _Start, seed: int) -> None:
        self._search, self._fit, self._name = search, start.fit, start.name
        self._order, self._best = start.order.copy(), start.order.copy()
        self._offsets = np.full(len(start.order), -1, dtype=np.int64)
        height = search._put(self._order, self._fit, self._offsets)
        self._state = np.array([0x9E3779B97F4A7C1 + 2 * seed, height, height, search.lower], dtype=np.int64)

    def go(self, work: int) -> None:
        """Spend `work` neighbours looked at; tell the search of anything lower."""
        search = self._search
        arrays = search.sizes, search._rows, search._neighbours, self._offsets, search._space()
        search.work += int(search._kernels.search(self._order, self._best, self._fit, self._state, work, *arrays))
        if int(self._state[2]) < search.best:
            offsets = np.full(len(self._best), -1, dtype=np.int64)
            search._keep(search._put(self._best, self._fit, offsets), offsets, f"local search from {self._name}, {GAPS[self._fit]}")


def event_numbers(births: np.ndarray, deaths: np.ndarray) -> np.ndarray:
    """Block number + 1 at its birth, minus that at its death, in time; at equal times deaths first."""
    numbers = np.arange(1, len(births) + 1, dtype=np.int64)
    times = np.concatenate([births, deaths])
    kinds = np.concatenate([np.ones(len(births), dtype=np.int64), np.zeros(len(deaths), dtype=np.int64)])
    return np.concatenate([numbers, -numbers])[np.lexsort((kinds, times))]


def most_live(live: np.ndarray, births: np.ndarray, deaths: np.ndarray) -> np.ndarray:
    """The most alive at one time of each block's life: a table of maxima over powers of two."""
    levels = [live]
    while 2 ** len(levels) <= len(live):
        last, half = levels[-1], 2 ** (len(levels) - 1)
        levels.append(np.maximum(last[:-half], last[half:]))
    level = np.log2(np.maximum(1, deaths - births)).astype(np.int64)
    out = np.zeros(len(births), dtype=np.int64)
    for k, table in enumerate(levels):
        at = level == k
        out[at] = np.maximum(table[births[at]], table[deaths[at] - 2**k])
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How long to look. `work`: neighbours looked at, in all; `wall_s`: the end whatever the work."""

    work: int = 500_000_000
    wall_s: float = 20.0
