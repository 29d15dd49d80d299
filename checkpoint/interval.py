"""Decides how many steps lie between two saves. Pure.

J. W. Young, "A first order approximation to the optimum checkpoint interval" (1974): sqrt(2 x cost x time between failures);
J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006), eq. 37, for its next terms.
The cost of a save is what training waits for it. Saves do not come faster than storage takes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..units import format_precise, format_seconds

_ROOM = 1.1
"""Storage is left a little time between two saves."""


@dataclass(frozen=True, slots=True)
class IntervalPlan:
    """When the next save comes, and why."""

    steps: int
    why: str

    def __str__(self) -> str:
        return f"a checkpoint every {self.steps} steps: {self.why}"


def solve_interval(*, stall_s: float, durable_s: float, step_s: float, mean_time_to_failure_s: float) -> IntervalPlan:
    """Solve for the next save; `stall_s`: what training waits per save; `durable_s`: until it counts; `step_s`: of one update."""
    assert step_s > 0 and mean_time_to_failure_s > 0
    best_s = daly_s(stall_s, mean_time_to_failure_s)
    least_s = durable_s * _ROOM
    steps = max(1, math.ceil(max(best_s, least_s) / step_s))
    cost = f"a save stops training for {format_precise(stall_s)}, a failure is expected every {format_seconds(mean_time_to_failure_s)}"
    if least_s > best_s:
        return IntervalPlan(steps, f"{cost}, and storage takes {format_seconds(durable_s)} for one, which decides")
    return IntervalPlan(steps, f"{cost}, so {format_seconds(best_s)} between saves lose least")


def daly_s(cost_s: float, mean_time_to_failure_s: float) -> float:
    """Daly's interval; the time between failures itself where a save costs more than twice that."""
    if cost_s >= 2 * mean_time_to_failure_s:
        return mean_time_to_failure_s
    share = cost_s / (2 * mean_time_to_failure_s)
    return math.sqrt(2 * cost_s * mean_time_to_failure_s) * (1 + math.sqrt(share) / 3 + share / 9) - cost_s
