"""When every unit of a pipeline schedule runs, and what it holds: a schedule under costs per unit. Pure.

A rank runs its units one after the other, each once what it needs has come. Messages travel beside computation: `alpha_s` and so much a
byte each, those from one rank to another one after the other. What the model leaves out: receive buffers, links shared by several
pairs of ranks, and kernels that slow down while messages travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import PlanError
from .pipeline_plan import PipelineSchedule, Unit, UnitKind, check, max_in_flight

Floats = NDArray[np.float64]
_KINDS = {UnitKind.FORWARD: 0, UnitKind.BACKWARD: 1, UnitKind.WEIGHT: 2}


@dataclass(frozen=True, kw_only=True, eq=False)
class PipelineCosts:
    """Seconds and bytes of units. All arrays but the last are (virtual stages, micro-batches, slices)."""

    forward_s: Floats
    backward_s: Floats
    """Of gradients of inputs, with what is recomputed for them."""
    weight_s: Floats
    """Of gradients of weights: a backward unit that is not split takes them too."""
    output_bytes: Floats
    """What a stage sends on; its gradient is as large."""
    held_bytes: Floats
    """Waits from a unit's forward pass to the end of its backward pass."""
    weight_bytes: Floats
    """Of a split backward pass: waits from it to the end of its `W`."""
    work_bytes: Floats
    """Beside that, while a forward or backward unit runs: what is recomputed and dropped at once."""
    fixed_bytes: Floats
    """Of each virtual stage, whatever is scheduled: weights, gradients, states. Shape (virtual stages,)."""
    alpha_s: float = 0.0
    """Of each message."""
    s_per_byte: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Virtual stages, micro-batches, slices."""
        stages, batches, slices = self.forward_s.shape
        return stages, batches, slices


def costs(
    shape: tuple[int, int, int],
    *,
    forward_s: ArrayLike = 1.0,
    backward_s: ArrayLike = 1.0,
    weight_s: ArrayLike = 1.0,
    output_bytes: ArrayLike = 0.0,
    held_bytes: ArrayLike = 1.0,
    weight_bytes: ArrayLike | None = None,
    work_bytes: ArrayLike = 0.0,
    fixed_bytes: ArrayLike = 0.0,
    alpha_s: float = 0.0,
    s_per_byte: float = 0.0,
) -> PipelineCosts:
    """Costs of `shape` (virtual stages, micro-batches, slices) from numbers and arrays that broadcast to it.

    None for `weight_bytes`: all that is held waits for the gradients of weights.
    """

    def full(values: ArrayLike) -> Floats:
        return np.broadcast_to(np.asarray(values, dtype=np.float64), shape)

    return PipelineCosts(
        forward_s=full(forward_s),
        backward_s=full(backward_s),
        weight_s=full(weight_s),
        output_bytes=full(output_bytes),
        held_bytes=full(held_bytes),
        weight_bytes=full(held_bytes if weight_bytes is None else weight_bytes),
        work_bytes=full(work_bytes),
        fixed_bytes=np.broadcast_to(np.asarray(fixed_bytes, dtype=np.float64), shape[:1]),
        alpha_s=alpha_s,
        s_per_byte=s_per_byte,
    )


@dataclass(frozen=True, slots=True)
class TimedUnit:
    """A unit's time, from the start of the step."""

    unit: Unit
    rank: int
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class PipelineTimeline:
    """A schedule in time."""

    schedule: PipelineSchedule
    starts_s: tuple[tuple[float, ...], ...]
    """By rank, in the order of its units; so are ends."""
    ends_s: tuple[tuple[float, ...], ...]
    step_s: float
    """From the first unit's start to the last one's end."""
    peak_bytes: tuple[float, ...]
    """By rank: what its stages hold at most at one time, fixed bytes counted."""

    @property
    def units(self) -> Iterator[TimedUnit]:
        """Every unit with its times."""
        for rank, order in enumerate(self.schedule.orders):
            for unit, start_s, end_s in zip(order, self.starts_s[rank], self.ends_s[rank], strict=True):
                yield TimedUnit(unit, rank, start_s, end_s)

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds of computation, by rank."""
        return tuple(sum(ends) - sum(starts) for starts, ends in zip(self.starts_s, self.ends_s, strict=True))

    @property
    def bubble_shares(self) -> tuple[float, ...]:
        """Share of the step in which each rank computes nothing."""
        return tuple(1 - busy / self.step_s if self.step_s > 0 else 0.0 for busy in self.busy_s)

    @property
    def bubble_share(self) -> float:
        """Share of all ranks' time in which they compute nothing."""
        return sum(self.bubble_shares) / len(self.bubble_shares)

    @property
    def peak_units(self) -> tuple[int, ...]:
        """Units of each rank that wait for their last backward pass, at most at one time."""
        return tuple(max_in_flight(self.schedule, rank) for rank in range(self.schedule.num_ranks))


def simulate(schedule: PipelineSchedule, costs: PipelineCosts) -> PipelineTimeline:
    """Run a schedule. PlanError where it waits for ever, or for costs of another shape."""
    shape = schedule.num_stages, schedule.num_micro_batches, schedule.slices
    if costs.shape != shape:
        expected = "costs of (virtual stages, micro-batches, slices) of the schedule"
        raise PlanError("pipeline costs", found=f"{costs.shape} for a schedule of {shape}", expected=expected, hint=f"costs({shape})")
    clock = _Clock(schedule, costs)
    clock.run()
    if any(len(ends) < len(order) for ends, order in zip(clock.ends, schedule.orders, strict=True)):
        check(schedule)
        raise AssertionError("a schedule that runs to the end stopped")
    return PipelineTimeline(
        schedule=schedule,
        starts_s=tuple(map(tuple, clock.starts)),
        ends_s=tuple(map(tuple, clock.ends)),
        step_s=max(ends[-1] for ends in clock.ends),
        peak_bytes=tuple(_peak_bytes(schedule, costs, rank) for rank in range(schedule.num_ranks)),
    )


class _Clock:
    """Ranks that advance as far as what they need has come. Units are numbers: (stage x micro-batches + micro-batch) x slices + slice."""

    def __init__(self, schedule: PipelineSchedule, costs: PipelineCosts) -> None:
        self.schedule, self.costs = schedule, costs
        stages, batches, slices = costs.shape
        self.stride, self.slices, self.stages = batches * slices, slices, stages
        count = stages * self.stride
        whole = (costs.backward_s + costs.weight_s).ravel().tolist()
        backward, weight = costs.backward_s.ravel().tolist(), costs.weight_s.ravel().tolist()
        for unit in schedule.split:
            number = self.number(unit)
            whole[number] = backward[number]
        self.seconds = (costs.forward_s.ravel().tolist(), whole, weight)
        self.message_s = (costs.alpha_s + costs.s_per_byte * costs.output_bytes).ravel().tolist()
        # When a unit ended, and when what it made is where the neighbouring stage is.
        self.ended: list[list[float | None]] = [[None] * count for _ in _KINDS]
        self.come: list[list[float | None]] = [[None] * count for _ in _KINDS]
        self.starts: list[list[float]] = [[] for _ in schedule.orders]
        self.ends: list[list[float]] = [[] for _ in schedule.orders]
        self.link_free: dict[tuple[int, int], float] = {}
        self.waiting: dict[tuple[int, int], set[int]] = {}

    def number(self, unit: Unit) -> int:
        return unit.stage * self.stride + unit.micro_batch * self.slices + unit.slice

    def run(self) -> None:
        """All ranks, each again when what it waited for has come."""
        ready = list(range(self.schedule.num_ranks))
        while ready:
            rank = ready.pop()
            order, ends = self.schedule.orders[rank], self.ends[rank]
            while len(ends) < len(order):
                kind, number = _KINDS[order[len(ends)].kind], self.number(order[len(ends)])
                start = self.start(order[len(ends)], number, ends[-1] if ends else 0.0, rank)
                if start is None:
                    break
                self.starts[rank].append(start)
                self.finish(order[len(ends)], kind, number, start + self.seconds[kind][number], rank)
                ready += self.waiting.pop((kind, number), ())

    def start(self, unit: Unit, number: int, free_s: float, rank: int) -> float | None:
        """When a unit starts; None: what it needs has no time yet, and the rank waits for it."""
        for kind, need, times in self.needs(unit, number):
            at = times[need]
            if at is None:
                self.waiting.setdefault((kind, need), set()).add(rank)
                return None
            free_s = max(free_s, at)
        return free_s

    def needs(self, unit: Unit, number: int) -> Iterator[tuple[int, int, list[float | None]]]:
        """`PipelineSchedule.needs`, as numbers."""
        if unit.kind is UnitKind.FORWARD:
            if unit.stage:
                yield 0, number - self.stride, self.come[0]
            if unit.slice:
                yield 0, number - 1, self.ended[0]
        elif unit.kind is UnitKind.BACKWARD:
            yield 0, number, self.ended[0]
            if unit.stage + 1 < self.stages:
                yield 1, number + self.stride, self.come[1]
            if unit.slice + 1 < self.slices:
                yield 1, number + 1, self.ended[1]
        else:
            yield 1, number, self.ended[1]

    def finish(self, unit: Unit, kind: int, number: int, end_s: float, rank: int) -> None:
        self.ends[rank].append(end_s)
        self.ended[kind][number] = end_s
        receiver = self.schedule.receiver(unit)
        come_s = end_s
        if receiver is not None:
            come_s = max(end_s, self.link_free.get((rank, receiver), 0.0)) + self.message_s[number]
            self.link_free[rank, receiver] = come_s
        self.come[kind][number] = come_s


def _peak_bytes(schedule: PipelineSchedule, costs: PipelineCosts, rank: int) -> float:
    held = float(sum(costs.fixed_bytes[stage] for stage in schedule.stages_of(rank)))
    most = held
    split, (_, batches, slices) = schedule.split, costs.shape
    waits, for_weights, work = (values.ravel().tolist() for values in (costs.held_bytes, costs.weight_bytes, costs.work_bytes))
    for unit in schedule.orders[rank]:
        at = (unit.stage * batches + unit.micro_batch) * slices + unit.slice
        if unit.kind is UnitKind.FORWARD:
            held += waits[at]
        if unit.kind is not UnitKind.WEIGHT:
            most = max(most, held + work[at])
        if unit.kind is UnitKind.BACKWARD:
            held -= waits[at]
            held += for_weights[at] if unit in split else 0.0
        elif unit.kind is UnitKind.WEIGHT:
            held -= for_weights[at]
    return most
