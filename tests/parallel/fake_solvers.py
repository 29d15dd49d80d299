"""Solvers that a planning process of the tests runs: right away, slowly, or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path

from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan


def quick(lengths, cost):
    """Everything on the largest group, one sequence a micro-batch."""
    batches = tuple(MicroBatch((Group(0, cost.largest, 1, (index,)),)) for index in range(len(lengths)))
    return cost.priced(StepPlan(cost.world_size, tuple(lengths), batches, source="adaptive"))


def late_at_50(lengths, cost):
    """A step whose first sequence has 50 tokens takes until somebody makes the file that SOLVER_WAITS_FOR names."""
    file = Path(os.environ["SOLVER_WAITS_FOR"])
    if lengths[0] == 50:
        file.with_name(f"{file.name}.awaited").touch()
        while not file.exists():
            time.sleep(0.01)
    return quick(lengths, cost)


def broken(lengths, cost):
    raise ZeroDivisionError("a bug in the solver")


def dies_at_50(lengths, cost):
    if lengths[0] == 50:
        os._exit(7)
    return quick(lengths, cost)
