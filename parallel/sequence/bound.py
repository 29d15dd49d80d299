"""How good a plan of these lengths can be at most: two lower bounds on the modelled time of a step.

Both hold for every plan with a barrier between micro-batches, in this cost model. Neither assumes that cost grows with length or
degree; both assume that a group's time is the sum of its sequences' and that every sequence takes time. Where that fails the
bound says so (`valid`, `reason`) and its value is worth nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .class_lp import ClassProgram, Effort, solve_program
from .cost import CostModel
from .staircase_bound import staircase, tightened
from .tables import Batch

FINE = Effort(alone=16, bucket_ratio=1.12, class_ratio=1.25, cuts=3)
TOLERANCE = 1e-6
"""Given away, as a share, for what a solver calls feasible."""


@dataclass(frozen=True, slots=True)
class Bound:
    """No plan takes less than `value_s`, step_s included, if `valid`."""

    value_s: float
    name: str
    valid: bool
    reason: str = ""
    """Why it is not valid, or what should be known of it."""


def staircase_bound(lengths: Sequence[int], cost: CostModel) -> Bound:
    """The bound in closed form: takes milliseconds. PlanError for lengths that no plan holds."""
    return staircase_of(Batch(lengths, cost, use_compiled=False))


def staircase_of(batch: Batch) -> Bound:
    """The staircase bound of a batch whose tables are there already."""
    name, reason = "staircase", _fault(batch)
    if reason:
        return Bound(0.0, name, False, reason)
    note = (
        ""
        if batch.cost.is_monotone()
        else "cost is not monotone: least work and fastest times over degrees were used, each in its own order"
    )
    return Bound(batch.cost.step_s + staircase(batch, np.arange(len(batch))).rest_s * (1 - 1e-12), name, True, note)


def tightened_by(batch: Batch, closed: Bound, plan_s: float) -> Bound:
    """The staircase bound again, knowing a plan of `plan_s`: no shelf of a faster one lasts long, so sequences need wider groups."""
    if not closed.valid:
        return closed
    value = batch.cost.step_s + tightened(batch, plan_s - batch.cost.step_s) * (1 - 1e-12)
    return Bound(max(closed.value_s, value), closed.name, True, closed.reason)


def class_milp_bound(
    lengths: Sequence[int], cost: CostModel, *, plan_s: float, time_limit_s: float = 10.0, effort: Effort = FINE, integer: bool = True
) -> Bound:
    """The bound by a mixed-integer program over classes of duration (HiGHS): seconds. At least the staircase bound, at most `plan_s`.

    `plan_s` is the predicted_s of a plan that exists; a tighter one makes a tighter program. `integer=False` is its relaxation.
    """
    batch = Batch(lengths, cost, use_compiled=False)
    closed = staircase_of(batch)
    if not closed.valid or not len(batch):
        return closed
    closed = tightened_by(batch, closed, plan_s)
    stairs = closed.value_s - cost.step_s
    limit = (plan_s - cost.step_s) * (1 + TOLERANCE)
    if limit <= stairs:
        return closed
    proved = solve_program(ClassProgram(batch, limit, effort), integer=integer, time_limit_s=time_limit_s, floor_s=stairs)
    if proved is None:
        return Bound(closed.value_s, closed.name, True, f"the class program proved nothing in {time_limit_s:g} s")
    value = cost.step_s + min(proved * (1 - TOLERANCE), plan_s - cost.step_s)
    return Bound(value, "class MILP" if integer else "class LP", True) if value > closed.value_s else closed


def _fault(batch: Batch) -> str:
    """What makes bounds worthless for this batch, if anything does."""
    reachable = np.arange(len(batch.degrees)) >= batch.first[:, None]
    times = batch.times[reachable]
    if not np.all(np.isfinite(times)):
        return "the cost model gives times that are not finite"
    if np.any(times <= 0):
        return "the cost model gives some sequences no time or less: more of them would make a group faster"
    if min(batch.cost.beta_s, batch.cost.gather_s) < 0:
        return "the cost model gives a micro-batch less than no time"
    return ""
