"""When every group of a step runs, by the cost model. Pure; what tables and pictures of a plan are made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plan import Group, StepPlan

if TYPE_CHECKING:
    from .cost import CostModel


@dataclass(frozen=True, slots=True)
class Bar:
    """One group's time. Seconds count from the start of the step; `sequence_s[i]` belongs to `group.sequences[i]`."""

    micro_batch: int
    group: Group
    lengths: tuple[int, ...]
    sequence_s: tuple[float, ...]
    start_s: float
    stop_s: float
    measured_s: float | None = None
    """What the group really took, where a run has measured it."""

    @property
    def seconds(self) -> float:
        return self.stop_s - self.start_s

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Shelf:
    """One micro-batch: `overhead_s` of it is paid before its groups start; the slowest of them ends at `groups_stop_s`.

    Where weights take longer to gather than the groups to compute, it stops later than they do.
    """

    start_s: float
    overhead_s: float
    groups_stop_s: float
    stop_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """A step of `world_size` ranks as bars. With `barrier_free` every rank continues as soon as its own group is done."""

    world_size: int
    tokens_per_rank: int
    bars: tuple[Bar, ...]
    shelves: tuple[Shelf, ...]
    step_s: float
    barrier_free: bool = False

    @property
    def busy_share(self) -> float:
        """Rank-seconds in which a group runs, over all of the step's; the rest is overhead and waiting."""
        busy = sum(bar.seconds * bar.group.degree for bar in self.bars)
        return busy / (self.step_s * self.world_size) if self.step_s > 0 else 0.0

    @property
    def overhead_share(self) -> float:
        """Rank-seconds of the step that its micro-batches and the step itself cost, whatever they hold."""
        if self.step_s <= 0:
            return 0.0
        paid = sum(shelf.overhead_s for shelf in self.shelves)
        if self.barrier_free:
            paid = sum(self.shelves[bar.micro_batch].overhead_s * bar.group.degree for bar in self.bars) / self.world_size
        return (paid + self.step_s - max((shelf.stop_s for shelf in self.shelves), default=0.0)) / self.step_s

    @property
    def gather_share(self) -> float:
        """Rank-seconds in which all groups of a micro-batch are done, or none has begun, and weights are being gathered."""
        if self.step_s <= 0 or not self.shelves:
            return 0.0
        return (self.shelves[0].start_s + sum(shelf.stop_s - shelf.groups_stop_s for shelf in self.shelves)) / self.step_s

    @property
    def waiting_share(self) -> float:
        """Rank-seconds spent waiting for slower groups: the bubble."""
        return max(0.0, 1.0 - self.busy_share - self.overhead_share - self.gather_share)

    @property
    def longest(self) -> Bar:
        """The bar that holds the longest sequence, the first of equals."""
        return max(self.bars, key=lambda bar: max(bar.lengths))

    def of(self, micro_batch: int) -> Iterator[Bar]:
        return (bar for bar in self.bars if bar.micro_batch == micro_batch)


def timeline(
    plan: StepPlan, cost: CostModel, *, measured: Mapping[tuple[int, int], float] | None = None, barrier_free: bool = False
) -> Timeline:
    """The step as the cost model sees it. `measured` holds seconds by (micro-batch, first rank) of a group."""
    free = [cost.gather_s if barrier_free else 0.0] * plan.world_size
    bars: list[Bar] = []
    shelves: list[Shelf] = []
    for index, batch in enumerate(plan.micro_batches):
        begin = min(free) if barrier_free else max(free)
        for group in batch.groups:
            ranks = slice(group.first_rank, group.first_rank + group.degree)
            bar = _bar(plan, cost, index, group, max(free[ranks]) + cost.beta_s, measured or {})
            free[ranks] = [bar.stop_s] * group.degree
            bars.append(bar)
        groups_stop = stop = max(free)
        if not barrier_free:
            groups_stop = max(groups_stop, begin + cost.beta_s)
            # Gathering weights takes its time even where no group needs as long.
            stop = max(groups_stop, begin + cost.beta_s + cost.gather_s)
            free = [stop] * plan.world_size
        shelves.append(Shelf(begin, cost.beta_s, groups_stop, stop))
    return Timeline(
        world_size=plan.world_size,
        tokens_per_rank=cost.tokens_per_rank,
        bars=tuple(bars),
        shelves=tuple(shelves),
        step_s=max(free) + cost.step_s,
        barrier_free=barrier_free,
    )


def _bar(plan: StepPlan, cost: CostModel, index: int, group: Group, start: float, measured: Mapping[tuple[int, int], float]) -> Bar:
    import numpy as np

    # Longest first, as people look for the long ones.
    order = sorted(group.sequences, key=lambda i: (-plan.lengths[i], i))
    lengths = tuple(plan.lengths[i] for i in order)
    seconds = tuple(float(value) for value in cost.sequence_s(np.array(lengths, dtype=np.int64), group.degree))
    ordered = Group(group.first_rank, group.degree, group.ulysses, tuple(order))
    return Bar(index, ordered, lengths, seconds, start, start + sum(seconds), measured.get((index, group.first_rank)))
