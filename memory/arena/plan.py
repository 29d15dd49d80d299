"""Addresses for one step's allocations: offline dynamic storage allocation, all blocks in one arena. Pure.

Minimise the height so that no two blocks that share a moment share an address. No placement is lower than the most bytes ever
live, so a search that reaches them stops there with a proof. MEMO (2407.12117, sec. 4.2) plans layer by layer first and takes each
layer for one block; planned at once, the blocks of one layer fill the gaps between another's.

The methods are greedy: blocks in some order, each into the lowest or the tightest gap beside those placed (12 ways), then a
local search over the best order. Work is counted in neighbours looked at, so the same trace and budget give the same plan on
every machine, unless the wall clock stops it first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...units import format_bytes
from .trace import Trace, round_up

if TYPE_CHECKING:
    import numpy as np

    from .place import Kernels

MAX_PAIRS = 30_000_000
"""Above it only the ways that need no lists of neighbours are tried (4 bytes twice for each pair)."""
OUTSIDE = -1
"""The offset of an allocation that is not in the arena."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How long to look. `work`: neighbours looked at, in all; `wall_s`: the end whatever the work."""

    work: int = 500_000_000
    wall_s: float = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaPlan:
    """Where each allocation of a trace goes."""

    sizes: tuple[int, ...]
    """Bytes as asked for, in the order of the requests."""
    offsets: tuple[int, ...]
    """Bytes from the start of the arena; OUTSIDE for what is not placed in it."""
    height: int
    """Bytes of the arena."""
    max_live: int
    """Most bytes alive at one time, rounded up to the alignment: no plan is lower."""
    alignment: int
    method: str
    """What found it."""
    work: int
    """Neighbours looked at."""

    @property
    def ratio(self) -> float:
        """Height over the lower bound; 1 is proven to be the least."""
        return self.height / self.max_live if self.max_live else 1.0

    @property
    def num_planned(self) -> int:
        return sum(offset != OUTSIDE for offset in self.offsets)

    def describe(self) -> str:
        """In words."""
        proven = "the least there is" if self.height == self.max_live else f"at most {self.ratio - 1:.2%} above the least"
        outside = len(self.sizes) - self.num_planned
        rest = f"; {outside} more outlive the step and stay outside" if outside else ""
        return f"arena of {format_bytes(self.height)} for {self.num_planned} allocations, {proven} ({self.method}){rest}"


def plan_arena(
    trace: Trace,
    *,
    alignment: int = 1,
    budget: Budget | None = None,
    seed: int = 0,
    compile_loops: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> ArenaPlan:
    """The lowest placement found within the budget. What outlives the trace is placed too: take `trace.within()` to leave it out.

    `cancelled` is asked now and then, from this thread; once it says so, what was found so far is the plan.
    """
    from .place import PLAIN, compiled

    if alignment < 1:
        raise ValueError(f"an alignment of {alignment} bytes")
    kernels = (compiled() if compile_loops else None) or PLAIN
    search = _Search(trace, alignment, budget or Budget(), kernels)
    search.cancelled = cancelled
    if len(trace):
        search.run(seed)
    return ArenaPlan(
        sizes=trace.sizes,
        offsets=tuple(int(offset) * search.unit for offset in search.best_offsets),
        height=search.best * search.unit if len(trace) else 0,
        max_live=search.lower * search.unit,
        alignment=alignment,
        method=search.method,
        work=search.work,
    )


def spread(plan: ArenaPlan, whole: Trace) -> ArenaPlan:
    """A plan of `whole.within()` as one of `whole`: what outlives the trace is OUTSIDE."""
    offsets = iter(plan.offsets)
    return ArenaPlan(
        sizes=whole.sizes,
        offsets=tuple(OUTSIDE if whole.outlives(index) else next(offsets) for index in range(len(whole))),
        height=plan.height,
        max_live=plan.max_live,
        alignment=plan.alignment,
        method=plan.method,
        work=plan.work,
    )


def check_plan(plan: ArenaPlan, trace: Trace) -> None:
    """ValueError where two blocks that share a moment share an address, or one is misaligned or reaches out of the arena."""
    if plan.sizes != trace.sizes:
        raise ValueError("the plan is of another trace")
    live: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(trace)), key=lambda index: trace.births[index]):
        live = {other: span for other, span in live.items() if trace.deaths[other] > trace.births[index]}
        if plan.offsets[index] != OUTSIDE:
            live[index] = _checked(plan, index, live)


def _checked(plan: ArenaPlan, index: int, live: dict[int, tuple[int, int]]) -> tuple[int, int]:
    low = plan.offsets[index]
    high = low + round_up(plan.sizes[index], plan.alignment)
    if low < 0 or low % plan.alignment or high > plan.height:
        raise ValueError(f"allocation {index} at {low} ... {high} is misaligned or outside an arena of {plan.height} bytes")
    for other, (start, stop) in live.items():
        if low < stop and start < high:
            raise ValueError(f"allocations {index} and {other} share addresses while both live")
    return low, high


class _Search:
    """One planning: arrays in units of the sizes' common divisor, and the best placement so far."""

    def __init__(self, trace: Trace, alignment: int, budget: Budget, kernels: Kernels) -> None:
        import math

        import numpy as np

        rounded = [round_up(size, alignment) for size in trace.sizes]
        self.unit = math.gcd(*rounded) if rounded else 1
        self.sizes = np.array([size // self.unit for size in rounded], dtype=np.int64)
        self.births, self.deaths = np.array(trace.births, dtype=np.int64), np.array(trace.deaths, dtype=np.int64)
        self.live = np.array(trace.live_bytes(alignment), dtype=np.int64) // self.unit
        self.lower = int(self.live.max(initial=0))
        self.events = _events(self.births, self.deaths)
        self.kernels, self.budget, self.started = kernels, budget, time.monotonic()
        self.cancelled: Callable[[], bool] = lambda: False
        self.best, self.best_offsets, self.method, self.work = -1, np.zeros(0, dtype=np.int64), "nothing to place", 0
        self.best_order: np.ndarray | None = None
        self.best_fit = 0
        self.starts = self.neighbours = np.zeros(0, dtype=np.int64)

    def run(self, seed: int) -> None:
        from .place import BEST, FIRST

        for fit in (FIRST, BEST):
            self._sweep(fit, backward=False)
            self._sweep(fit, backward=True)
        if self._ended() or self.kernels.count_pairs(self.events) > MAX_PAIRS:
            return
        self._find_neighbours()
        for name, order in self._orders():
            for fit in (FIRST, BEST):
                self._place(name, order, fit)
                if self._ended():
                    return
        self._improve(seed)

    def _ended(self) -> bool:
        return self.best == self.lower or self.work >= self.budget.work or self._late()

    def _late(self) -> bool:
        return time.monotonic() - self.started > self.budget.wall_s or self.cancelled()

    def _sweep(self, fit: int, *, backward: bool) -> None:
        import numpy as np

        n = len(self.sizes)
        events = -self.events[::-1] if backward else self.events
        offsets = np.full(n, -1, dtype=np.int64)
        space = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        height, work = self.kernels.sweep(events, fit, self.sizes, offsets, *space)
        self.work += work
        self._keep(height, offsets, f"in order of {'death, backwards' if backward else 'birth'}", fit, None)

    def _place(self, name: str, order: np.ndarray, fit: int) -> None:
        import numpy as np

        offsets, limit = np.full(len(order), -1, dtype=np.int64), int(self.sizes.sum())
        height, work = self.kernels.put_all(order, 0, fit, limit, self.sizes, self.starts, self.neighbours, offsets, self._space())
        self.work += work
        self._keep(height, offsets, f"by {name}", fit, order)

    def _keep(self, height: int, offsets: np.ndarray, name: str, fit: int, order: np.ndarray | None) -> None:
        if self.best < 0 or height < self.best or (height == self.best and self.best_order is None and order is not None):
            self.best, self.best_offsets, self.best_order, self.best_fit = int(height), offsets, order, fit
            self.method = f"{name}, {'tightest' if fit else 'lowest'} gap"

    def _space(self) -> tuple[Any, Any, Any]:
        import numpy as np

        return tuple(np.zeros(len(self.sizes), dtype=np.int64) for _ in range(3))  # type: ignore[return-value]

    def _find_neighbours(self) -> None:
        import numpy as np

        n, none = len(self.sizes), np.zeros(0, dtype=np.int32)
        counts, live, where = (np.zeros(n, dtype=np.int64) for _ in range(3))
        self.starts = np.zeros(n + 1, dtype=np.int64)
        self.kernels.fill_pairs(self.events, self.starts, none, counts, live, where)
        self.starts[1:] = np.cumsum(counts)
        self.neighbours = np.zeros(int(self.starts[-1]), dtype=np.int32)
        counts[:] = 0
        self.kernels.fill_pairs(self.events, self.starts, self.neighbours, counts, live, where)
        self.work += 2 * len(self.neighbours)

    def _orders(self) -> list[tuple[str, np.ndarray]]:
        """Four orders beside birth and death, which the sweeps took."""
        import numpy as np

        life = self.deaths - self.births
        crowd = _most_live(self.live, self.births, self.deaths)
        return [
            ("size", np.lexsort((self.births, -life, -self.sizes))),
            ("lifetime", np.lexsort((self.births, -self.sizes, -life))),
            ("size x lifetime", np.lexsort((self.births, -self.sizes * life))),
            ("crowding, then lifetime", np.lexsort((self.births, -self.sizes, -life, -crowd))),
        ]

    def _improve(self, seed: int) -> None:
        """Local search in slices of work, so that the wall clock is looked at between them."""
        import numpy as np

        order = self.best_order.copy() if self.best_order is not None else np.argsort(self.births).astype(np.int64)
        fit, best, offsets, space = self.best_fit, order.copy(), np.full(len(order), -1, dtype=np.int64), self._space()
        arrays = self.sizes, self.starts, self.neighbours, offsets, space
        height, _ = self.kernels.put_all(order, 0, fit, int(self.sizes.sum()), *arrays)
        state = np.array([0x9E3779B97F4A7C1 + 2 * seed, height, height, self.lower], dtype=np.int64)
        found = False
        while not self._ended() and state[2] > self.lower:
            allowed = min(20_000_000, self.budget.work - self.work)
            self.work += int(self.kernels.search(order, best, fit, state, allowed, *arrays))
            found = found or int(state[2]) < self.best
        if found:
            height, _ = self.kernels.put_all(best, 0, fit, int(self.sizes.sum()), *arrays)
            self.best, self.best_offsets, self.method = int(height), offsets, f"local search from {self.method}"


def _events(births: np.ndarray, deaths: np.ndarray) -> np.ndarray:
    """Block number + 1 at its birth, minus that at its death, in time; at equal times deaths first."""
    import numpy as np

    numbers = np.arange(1, len(births) + 1, dtype=np.int64)
    times = np.concatenate([births, deaths])
    kinds = np.concatenate([np.ones(len(births), dtype=np.int64), np.zeros(len(deaths), dtype=np.int64)])
    return np.concatenate([numbers, -numbers])[np.lexsort((kinds, times))]


def _most_live(live: np.ndarray, births: np.ndarray, deaths: np.ndarray) -> np.ndarray:
    """The most bytes alive at one time of each block's life: a table of maxima over powers of two."""
    import numpy as np

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
