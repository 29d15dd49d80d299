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
    return Simulator(schedule).run(costs)


class Simulator:
    """A schedule made ready to be run under one kind of costs after the other.

    Times of all units are in one list: ends of forward units, then when their outputs are where the next stage is, then both of backward
    units, then both of those of weights. `(stage x micro-batches + micro-batch) x slices + slice` is a unit's place in each part.
    """

    def __init__(self, schedule: PipelineSchedule) -> None:
        self.schedule = schedule
        self.shape = schedule.num_stages, schedule.num_micro_batches, schedule.slices
        self.count = schedule.num_stages * schedule.num_micro_batches * schedule.slices
        self.split = [self.place(unit) for unit in schedule.split]
        self.programs = [[self.step(unit) for unit in order] for order in schedule.orders]

    def place(self, unit: Unit) -> int:
        _, batches, slices = self.shape
        return (unit.stage * batches + unit.micro_batch) * slices + unit.slice

    def step(self, unit: Unit) -> tuple[int, int, int | None, tuple[int, ...]]:
        """A unit as numbers: kind, place, the rank its message goes to, and where the times are that it waits for."""
        kind, needs, (stages, batches, slices) = _KINDS[unit.kind], [], self.shape
        place, count = self.place(unit), self.count
        if kind == 0:
            needs += [count + place - batches * slices] if unit.stage else []
            needs += [place - 1] if unit.slice else []
        elif kind == 1:
            needs += [place]
            needs += [3 * count + place + batches * slices] if unit.stage + 1 < stages else []
            needs += [2 * count + place + 1] if unit.slice + 1 < slices else []
        else:
            needs += [2 * count + place]
        return kind, place, self.schedule.receiver(unit), tuple(needs)

    def run(self, costs: PipelineCosts) -> PipelineTimeline:
        """As `simulate`."""
        self._check_shape(costs)
        starts, ends = self._clock(self._seconds(costs), (costs.alpha_s + costs.s_per_byte * costs.output_bytes).ravel().tolist())
        if any(len(made) < len(order) for made, order in zip(ends, self.schedule.orders, strict=True)):
            check(self.schedule)
            raise AssertionError("a schedule that runs to the end stopped")
        return PipelineTimeline(
            schedule=self.schedule,
            starts_s=tuple(map(tuple, starts)),
            ends_s=tuple(map(tuple, ends)),
            step_s=max((made[-1] for made in ends if made), default=0.0),
            peak_bytes=self.peak_bytes(costs),
        )

    def busy_s(self, costs: PipelineCosts) -> list[float]:
        """Seconds of computation of each rank, which no order of its units can make less."""
        self._check_shape(costs)
        seconds = self._seconds(costs)
        return [sum(seconds[kind][place] for kind, place, _, _ in program) for program in self.programs]

    def peak_bytes(self, costs: PipelineCosts) -> tuple[float, ...]:
        """What each rank's stages hold at most at one time."""
        self._check_shape(costs)
        waits, for_weights, work = (values.ravel().tolist() for values in (costs.held_bytes, costs.weight_bytes, costs.work_bytes))
        later = [0.0] * self.count
        for place in self.split:
            later[place] = for_weights[place]
        peaks = []
        for rank, program in enumerate(self.programs):
            held = most = float(sum(costs.fixed_bytes[stage] for stage in self.schedule.stages_of(rank)))
            for kind, place, _, _ in program:
                if kind == 2:
                    held -= for_weights[place]
                    continue
                held += waits[place] if kind == 0 else 0.0
                most = max(most, held + work[place])
                held += later[place] - waits[place] if kind == 1 else 0.0
            peaks.append(most)
        return tuple(peaks)

    def _check_shape(self, costs: PipelineCosts) -> None:
        if costs.shape != self.shape:
            expected, found = "(virtual stages, micro-batches, slices) of the schedule", f"{costs.shape} for a schedule of {self.shape}"
            raise PlanError("pipeline costs", found=found, expected=expected, hint=f"costs({self.shape})")

    def _seconds(self, costs: PipelineCosts) -> tuple[list[float], list[float], list[float]]:
        backward, weight = costs.backward_s.ravel().tolist(), costs.weight_s.ravel().tolist()
        whole = [first + second for first, second in zip(backward, weight, strict=True)]
        for place in self.split:
            whole[place] = backward[place]
        return costs.forward_s.ravel().tolist(), whole, weight

    def _clock(self, seconds: tuple[list[float], ...], message_s: list[float]) -> tuple[list[list[float]], list[list[float]]]:
        """Starts and ends of each rank's units, as far as it gets: ranks advance, and wake those that waited for what they made."""
        count, times = self.count, [-1.0] * (6 * self.count)
        starts: list[list[float]] = [[] for _ in self.programs]
        ends: list[list[float]] = [[] for _ in self.programs]
        waiting: dict[int, int] = {}
        link_free: dict[tuple[int, int], float] = {}
        ready = list(range(len(self.programs)))
        while ready:
            rank = ready.pop()
            program, own_starts, own_ends = self.programs[rank], starts[rank], ends[rank]
            for kind, place, receiver, needs in program[len(own_ends) :]:
                start = own_ends[-1] if own_ends else 0.0
                missing = next((need for need in needs if times[need] < 0.0), None)
                if missing is not None:
                    # One rank at most waits for a message, and a rank waits for one thing.
                    waiting[missing] = rank
                    break
                for need in needs:
                    start = max(start, times[need])
                end = come = start + seconds[kind][place]
                if receiver is not None:
                    come = max(end, link_free.get((rank, receiver), 0.0)) + message_s[place]
                    link_free[rank, receiver] = come
                own_starts.append(start)
                own_ends.append(end)
                for at, key in ((end, 2 * kind * count + place), (come, (2 * kind + 1) * count + place)):
                    times[key] = at
                    if key in waiting:
                        ready.append(waiting.pop(key))
        return starts, ends
