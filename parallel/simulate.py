"""Modelled step times of several planners over the same steps. Pure but for the clock that times the planners themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

from ..errors import PlanError

if TYPE_CHECKING:
    from .sequence.cost import CostModel
    from .sequence.plan import StepPlan

Planner = Callable[[Sequence[int], "CostModel"], "StepPlan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """One planner; `max_steps` bounds how many steps a slow one is asked for, None: all."""

    name: str
    plan: Planner
    max_steps: int | None = None


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """What one planner made of one step."""

    step_s: float
    micro_batches: int
    plan_s: float
    """Wall time of the planner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step's sequences, and the outcome of every planner that was asked and could."""

    index: int
    sequences: int
    tokens: int
    longest: int
    lower_bound_s: float | None
    outcomes: dict[str, SimulatedStep]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One planner over its steps. `speedup` is how many times as long ours' reference steps took under it."""

    name: str
    steps: int
    mean_s: float
    median_s: float
    worst_s: float
    micro_batches: float
    plan_s_p50: float
    plan_s_max: float
    speedup: float
    """Its time over ours, on the steps both planned; above 1: ours is faster."""
    least: float
    """The smallest such quotient of a single step."""


def simulate(
    steps: Iterable[Sequence[int]],
    cost: CostModel,
    contestants: Sequence[Contestant],
    *,
    on_step: Callable[[Step], None] | None = None,
) -> list[Step]:
    """Every contestant's plan of every step, judged by `cost`. PlanError where a step cannot be planned by anyone."""
    steps_made = []
    for index, lengths in enumerate(steps):
        plans: dict[str, SimulatedStep] = {}
        bounds: list[float] = []
        errors: list[PlanError] = []
        for contestant in contestants:
            if contestant.max_steps is not None and index >= contestant.max_steps:
                continue
            try:
                plan, outcome = _ask(contestant, lengths, cost)
            except PlanError as error:
                errors.append(error)
                continue
            plans[contestant.name] = outcome
            bounds += [plan.lower_bound_s] if plan.lower_bound_s is not None else []
        if not plans:
            raise errors[0]
        step = Step(
            index=index,
            sequences=len(lengths),
            tokens=int(sum(lengths)),
            longest=int(max(lengths)),
            lower_bound_s=max(bounds, default=None),
            outcomes=plans,
        )
        steps_made.append(step)
        if on_step is not None:
            on_step(step)
    return steps_made


def _ask(contestant: Contestant, lengths: Sequence[int], cost: CostModel) -> tuple[StepPlan, SimulatedStep]:
    started = time.perf_counter()
    plan = contestant.plan(lengths, cost)
    took = time.perf_counter() - started
    # Judged here, whatever the planner itself predicted.
    return plan, SimulatedStep(cost.plan_s(plan), len(plan.micro_batches), took)


def rows(steps: Sequence[Step], ours: str) -> list[Row]:
    """One row per planner, in the order they were asked; `ours` names the one others are compared with."""
    names = list(dict.fromkeys(name for step in steps for name in step.outcomes))
    return [_row(name, steps, ours) for name in names]


def _row(name: str, steps: Sequence[Step], ours: str) -> Row:
    outcomes = [step.outcomes[name] for step in steps if name in step.outcomes]
    pairs = [(step.outcomes[name].step_s, step.outcomes[ours].step_s) for step in steps if name in step.outcomes and ours in step.outcomes]
    seconds = [outcome.step_s for outcome in outcomes]
    return Row(
        name=name,
        steps=len(outcomes),
        mean_s=fmean(seconds),
        median_s=median(seconds),
        worst_s=max(seconds),
        micro_batches=fmean(outcome.micro_batches for outcome in outcomes),
        plan_s_p50=median(outcome.plan_s for outcome in outcomes),
        plan_s_max=max(outcome.plan_s for outcome in outcomes),
        speedup=sum(theirs for theirs, _ in pairs) / sum(mine for _, mine in pairs),
        least=min(theirs / mine for theirs, mine in pairs),
    )


def gaps(steps: Sequence[Step], ours: str) -> list[float]:
    """How far our plans are above their lower bounds, as shares, where there is a bound."""
    return [
        max(0.0, step.outcomes[ours].step_s / step.lower_bound_s - 1)
        for step in steps
        if step.lower_bound_s is not None and ours in step.outcomes
    ]


def best_static(steps: Sequence[Step], names: Mapping[str, int]) -> str | None:
    """The best of the static planners (name -> degree), the one with the least time over all steps that all others planned too."""
    whole = [name for name in names if all(name in step.outcomes for step in steps)]
    return min(whole, key=lambda name: sum(step.outcomes[name].step_s for step in steps), default=None)
