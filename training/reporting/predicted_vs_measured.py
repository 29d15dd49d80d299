"""Compares a step's times with its plan: per group, the bubble, and the drift of the cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...estimate.measured.profile import Fit, FittedDegree, Profile, ProfileKey, squares_s
from ...parallel.sequence.cost import DegreeCost
from ...parallel.sequence.drift import Drift
from ...parallel.sequence.plan import Group, StepPlan

FADE = 0.98
WARM_UP = 2
"""Steps of an attempt that are no evidence: caches, pages and kernels are new."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The measured times of one step: `busy_s[rank][micro_batch]`."""

    busy_s: list[list[float]]
    backward_s: float
    """Wall seconds of all micro-batches, to the report after them."""
    step_s: float

    def group_s(self, batch: int, group: Group) -> float:
        """Busy seconds of each group: those of its busiest member."""
        return max(self.busy_s[rank][batch] for rank in range(group.first_rank, group.first_rank + group.degree))


def group_rows(plan: StepPlan, times: StepTimes, overhead_s: float) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, one per group; sequences are indices of the step."""
    return [
        {
            "micro_batch": index,
            "first_rank": group.first_rank,
            "degree": group.degree,
            "ulysses": group.ulysses,
            "sequences": list(group.sequences),
            "tokens": sum(plan.lengths[i] for i in group.sequences),
            "longest": max(plan.lengths[i] for i in group.sequences),
            "predicted_s": None if group.predicted_s is None else group.predicted_s + overhead_s,
            "measured_s": times.group_s(index, group),
        }
        for index, batch in enumerate(plan.micro_batches)
        for group in batch.groups
    ]


def plan_report(plan: StepPlan, times: StepTimes, overhead_s: float, *, barrier_free: bool) -> dict[str, Any]:
    """The step event's part about its plan; docs/adaptive.md lists the keys."""
    return {
        "planned_by": plan.source,
        "predicted_s": plan.predicted_s,
        "lower_bound_s": plan.lower_bound_s,
        "bound": plan.bound,
        "gap": plan.gap,
        "bubble": bubble(plan, times, barrier_free=barrier_free),
        "groups": group_rows(plan, times, overhead_s),
    }


def bubble(plan: StepPlan, times: StepTimes, *, barrier_free: bool) -> float:
    """Share of the ranks' time in which they waited for a busier rank: in each micro-batch, or over the step without barriers."""
    busy = times.busy_s
    spent = sum(map(sum, busy))
    if barrier_free:
        longest = max(map(sum, busy), default=0.0)
    else:
        longest = sum(max(rank[index] for rank in busy) for index in range(len(plan.micro_batches)))
    return 0.0 if longest <= 0 else 1 - spent / (plan.world_size * longest)


class StepComparison:
    """Tracks the drift of a run, and makes the profile that follows from it."""

    def __init__(self, drift: Drift, overhead_s: float) -> None:
        self.drift, self.overhead_s = drift, overhead_s
        self._steps = 0
        self._gather_s: float | None = None
        self._step_s: float | None = None

    def add(self, plan: StepPlan, times: StepTimes) -> None:
        self._steps += 1
        if self._steps <= WARM_UP:
            return
        for index, batch in enumerate(plan.micro_batches):
            for group in batch.groups:
                lengths = [plan.lengths[i] for i in group.sequences]
                self.drift.add(lengths, group.degree, times.group_s(index, group) - self.overhead_s)
        waits = sum(max(rank[index] for rank in times.busy_s) for index in range(len(plan.micro_batches)))
        gather = max(0.0, times.backward_s - waits) / max(1, len(plan.micro_batches))
        self._gather_s = _faded(self._gather_s, gather)
        self._step_s = _faded(self._step_s, times.step_s - times.backward_s)

    def summary(self) -> list[dict[str, Any]]:
        """How far predictions were off, per degree."""
        return [
            {"degree": degree, "groups": seen.groups, "measured_over_predicted": seen.ratio, "mean_error": seen.mean_error}
            for degree, seen in sorted(self.drift.by_degree.items())
        ]

    def profile(self, key: ProfileKey) -> Profile | None:
        """The profile of what the run measured of itself; None before it has measured anything."""
        if self._gather_s is None or self._step_s is None:
            return None
        degrees = tuple(self._fitted(cost) for cost in self.drift.refitted().degrees if cost.degree in self.drift.by_degree)
        return Profile(
            key=key, degrees=degrees, overhead_s=self.overhead_s, gather_s=self._gather_s, empty_s=self._gather_s, step_s=self._step_s
        )

    def _fitted(self, cost: DegreeCost) -> FittedDegree:
        seen = self.drift.by_degree[cost.degree]
        return FittedDegree(
            degree=cost.degree,
            ulysses=cost.ulysses,
            attention_s=squares_s(cost),
            linear_s=cost.linear_s,
            exchange_s=cost.exchange_s,
            fit=Fit(samples=seen.groups, mean_error=seen.mean_error),
        )

    def dump(self) -> dict[str, Any]:
        """The state as JSON, for checkpoints."""
        return self.drift.dump()


def _faded(old: float | None, new: float) -> float:
    return new if old is None else FADE * old + (1 - FADE) * new
