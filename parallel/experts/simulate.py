"""When every task of a planned phase runs: the plan's orders, in a cost model with contention. Pure.

What tables and pictures of a schedule are made from. Durations come from the costs, so a plan can be replayed under other costs than
those it was made with: on a machine that was measured again, or with other contention.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import PlanError
from .cost import Contention, LayerCost, Operator, OperatorCost, Resource
from .engine import START, STOP, runner
from .plan import ExpertSchedule, Phase, PhasePlan, Task

_NO_POOL = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Bar:
    """A task's time, from the start of its phase."""

    task: Task
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True)
class PhaseTimeline:
    """A phase as bars, in the order of the plan's tasks."""

    plan: PhasePlan
    bars: tuple[Bar, ...]
    seconds: float

    def busy_share(self, resource: Resource) -> float:
        """Share of the phase in which a resource is occupied."""
        busy = sum(bar.stop_s - bar.start_s for bar in self.bars if bar.task.resource is resource)
        return busy / self.seconds if self.seconds > 0 else 0.0


def simulate_schedule(schedule: ExpertSchedule, cost: LayerCost, contention: Contention) -> tuple[PhaseTimeline, PhaseTimeline]:
    """Forward and backward; a step takes the sum of both."""
    return simulate(schedule.forward, cost, contention), simulate(schedule.backward, cost, contention)


def simulate(plan: PhasePlan, cost: LayerCost, contention: Contention) -> PhaseTimeline:
    """Run a phase in its orders. PlanError where they wait for each other for ever, or a task has no cost."""
    count = len(plan.tasks)
    key, streams = np.zeros(count), np.zeros(count, np.int64)
    for stream, order in enumerate(plan.orders):
        for position, number in enumerate(order):
            key[number], streams[number] = position, stream
    needs = [number for task in plan.tasks for number in task.needs]
    need_end = np.cumsum([len(task.needs) for task in plan.tasks], dtype=np.int64)
    resources = np.array([task.resource for task in plan.tasks], dtype=np.int64)
    durations, gradient = np.array(seconds_of(plan, cost)), np.full(count, -1, np.int64)
    need, slow = np.array(needs, dtype=np.int64), np.array(contention.flat)
    seconds, _, floats, _ = runner()(resources, durations, need_end, need, gradient, streams, key, True, slow, _NO_POOL)
    if seconds < 0:
        raise PlanError(
            f"{plan.phase.value} schedule of experts",
            found="orders that wait for each other for ever",
            expected="every task after what it needs",
            hint="a schedule of solve.py",
        )
    rows = zip(plan.tasks, floats[START].tolist(), floats[STOP].tolist(), strict=True)
    return PhaseTimeline(plan, tuple(Bar(*row) for row in rows), float(seconds))


def seconds_of(plan: PhasePlan, cost: LayerCost) -> list[float]:
    """Seconds of every task alone."""
    rows = cost.forward if plan.phase is Phase.FORWARD else cost.backward[plan.weights]
    of = {(row.operator, row.resource): row for row in rows}
    return [_task_s(task, plan.share(task), of, cost) for task in plan.tasks]


def _task_s(task: Task, share: float, of: dict[tuple[Operator, Resource], OperatorCost], cost: LayerCost) -> float:
    if task.operator is Operator.REDUCE and cost.gradient is not None:
        return cost.gradient.seconds(task.elements)
    row = of.get((task.operator, task.resource))
    if row is None:
        raise PlanError(
            "costs of experts",
            found=f"no {task.operator.name} on {task.resource.name}",
            expected="a cost of every task of the plan",
            hint="a plan made with costs of the same layout",
        )
    return row.seconds(share)
