"""Addresses for one step's allocations: offline dynamic storage allocation, all blocks in one arena. Pure.

Minimise the height so that no two blocks that share a moment share an address. No placement is lower than the most bytes ever
live, so a search that reaches them stops there with a proof. MEMO (2407.12117, sec. 4.2) plans layer by layer first and takes each
layer for one block; planned at once, the blocks of one layer fill the gaps between another's.

The methods are greedy: blocks in some order, each into the lowest or the tightest gap beside those placed (12 ways), then a
local search from the best few orders. Work is counted in neighbours looked at, so the same trace and budget give the same plan on
every machine, unless the wall clock stops it first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...units import format_bytes
from .search import Budget
from .trace import Trace, round_up

OUTSIDE = -1
"""The offset of an allocation that is not in the arena."""


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
        """The plan in words."""
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
    from .search import PlacementSearch

    if alignment < 1:
        raise ValueError(f"an alignment of {alignment} bytes")
    kernels = (compiled() if compile_loops else None) or PLAIN
    search = PlacementSearch(trace, alignment, budget or Budget(), kernels, cancelled)
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
