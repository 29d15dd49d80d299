"""Why a plan is as it is: what the longest sequence could have had, and what other plans would have cost. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from ...errors import PlanError
from ...units import format_precise
from .cost import CostModel, DegreeCost
from .plan import Group, StepPlan
from .timeline import Timeline, timeline

if TYPE_CHECKING:
    import numpy as np

_SAME = 1e-3
"""Shares closer than this are called the same."""
Solver = Callable[[CostModel], StepPlan]
"""Plans the step's lengths for a cost model; PlanError where it cannot."""


class Verdict(Enum):
    """What a degree is for the longest sequence."""

    CHOSEN = "chosen"
    POSSIBLE = "possible"
    TOO_SMALL = "too small"
    EXCLUDED = "excluded"


@dataclass(frozen=True, slots=True)
class Choice:
    """One degree the longest sequence could have had."""

    degree: int
    ulysses: int | None
    verdict: Verdict
    reason: str
    sequence_s: float | None = None
    """Modelled seconds of the sequence by itself."""

    @property
    def rank_s(self) -> float | None:
        """Seconds times ranks: what it takes from the machine."""
        return None if self.sequence_s is None else self.sequence_s * self.degree


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another plan of the same sequences. `longest_degree` is what it gives the longest sequence; no seconds: it cannot be."""

    name: str
    predicted_s: float | None
    longest_degree: int | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """All there is to say about one plan, for tables, pictures and programs."""

    plan: StepPlan
    line: Timeline
    longest: int
    """Index of the longest sequence, the first of equals."""
    group: Group
    """Its group."""
    choices: tuple[Choice, ...]
    next_best: Alternative | None
    """The best plan found that keeps the longest sequence off its degree."""
    alternatives: tuple[Alternative, ...]
    adaptive: bool
    """Whether the plan is the adaptive planner's, whichever way it was found."""
    words: tuple[str, ...]


def explain(
    plan: StepPlan,
    cost: CostModel,
    *,
    solver: Solver,
    others: Mapping[str, Solver],
    measured: Mapping[tuple[int, int], float] | None = None,
    barrier_free: bool = False,
    adaptive: bool = True,
) -> Explanation:
    """The explanation of `plan`. `solver` is asked for the next-best plan, `others` by name for what else could have been done.

    `adaptive` says that the plan comes from `solver` too.
    """
    if barrier_free:
        # Bounds are proved for micro-batches that end together.
        plan = replace(plan, lower_bound_s=None, bound="")
    line = timeline(plan, cost, measured=measured, barrier_free=barrier_free)
    group = line.longest.group
    longest = group.sequences[0]
    choices = degree_choices(plan.lengths[longest], group.degree, cost)
    next_best = _next_best(plan, cost, solver, longest, group.degree, barrier_free) if _has_another(choices) else None
    alternatives = tuple(_alternative(name, other, cost, longest, barrier_free) for name, other in others.items())
    explanation = Explanation(
        plan=plan,
        line=line,
        longest=longest,
        group=group,
        choices=choices,
        next_best=next_best,
        alternatives=alternatives,
        adaptive=adaptive,
        words=(),
    )
    return replace(explanation, words=tuple(_words(explanation)))


def degree_choices(length: int, chosen: int, cost: CostModel) -> tuple[Choice, ...]:
    """Every degree, excluded ones too, with what it would mean for one sequence."""
    choices = [Choice(degree, None, Verdict.EXCLUDED, reason) for degree, reason in cost.excluded]
    for shape in cost.degrees:
        room = shape.degree * cost.tokens_per_rank
        seconds = float(shape.sequence_s(length))
        if shape.degree == chosen:
            choices.append(Choice(shape.degree, shape.ulysses, Verdict.CHOSEN, _shape(shape), seconds))
        elif room < length:
            reason = f"{shape.degree} x {cost.tokens_per_rank:,} = {room:,} tokens cannot hold it"
            choices.append(Choice(shape.degree, shape.ulysses, Verdict.TOO_SMALL, reason))
        else:
            choices.append(Choice(shape.degree, shape.ulysses, Verdict.POSSIBLE, _shape(shape), seconds))
    return tuple(sorted(choices, key=lambda choice: choice.degree))


def _shape(shape: DegreeCost) -> str:
    if shape.degree == 1:
        return "no exchange"
    return f"{shape.ulysses} Ulysses x {shape.ring} ring" if shape.ring > 1 else f"Ulysses over {shape.ulysses}"


def _has_another(choices: tuple[Choice, ...]) -> bool:
    return any(choice.verdict is Verdict.POSSIBLE for choice in choices)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Barred(DegreeCost):
    """A degree that sequences of `barred` tokens or more had better not use."""

    barred: int
    penalty_s: float

    def sequence_s(self, lengths: object) -> np.ndarray:
        import numpy as np

        # slots=True makes a new class, which the zero-argument super() does not know.
        return DegreeCost.sequence_s(self, lengths) + np.where(np.asarray(lengths) >= self.barred, self.penalty_s, 0.0)


def bar(cost: CostModel, degree: int, length: int, penalty_s: float) -> CostModel:
    """The model in which sequences of `length` tokens or more pay `penalty_s` for a group of `degree`."""
    fields = {name: getattr(cost.of(degree), name) for name in DegreeCost.__dataclass_fields__}
    barred = _Barred(**fields, barred=length, penalty_s=penalty_s)
    return replace(cost, degrees=tuple(barred if shape.degree == degree else shape for shape in cost.degrees))


def _next_best(plan: StepPlan, cost: CostModel, solver: Solver, longest: int, degree: int, barrier_free: bool) -> Alternative | None:
    """The plan of the same solver where the longest sequence may not have its degree; judged by the unchanged model."""
    penalty = 100.0 * max(cost.plan_s(plan), 1e-6)
    name = f"the longest sequence not on {degree} rank{'s' * (degree > 1)}"
    alternative = _alternative(name, lambda _: solver(bar(cost, degree, plan.lengths[longest], penalty)), cost, longest, barrier_free)
    return None if alternative.longest_degree == degree or alternative.predicted_s is None else alternative


def _alternative(name: str, solver: Solver, cost: CostModel, longest: int, barrier_free: bool) -> Alternative:
    try:
        plan = solver(cost)
    except PlanError as error:
        return Alternative(name, None, reason=error.found)
    (degree,) = (group.degree for batch in plan.micro_batches for group in batch.groups if longest in group.sequences)
    return Alternative(name, cost.plan_s(plan, barrier_free=barrier_free), degree)


def _words(explanation: Explanation) -> list[str]:
    parts = (_bound_words, _longest_words, _next_words, _other_words, _time_words)
    return [clause for part in parts for clause in part(explanation)]


def _bound_words(explanation: Explanation) -> list[str]:
    plan = explanation.plan
    if plan.lower_bound_s is None:
        return ["No lower bound: " + _why_unbounded(explanation.line.barrier_free)]
    share = max(0.0, explanation.line.step_s / plan.lower_bound_s - 1)
    least = f"No plan of these sequences takes less than {format_precise(plan.lower_bound_s)} ({plan.bound} bound)"
    return [f"{least}: this one is at most {share:.1%} above the best there can be."]


def _why_unbounded(barrier_free: bool) -> str:
    if barrier_free:
        return "the bounds are for micro-batches that end together, and here every rank goes on by itself."
    return "the cost model gives some sequences no time, or none that is finite."


def _longest_words(explanation: Explanation) -> list[str]:
    group, length = explanation.group, explanation.plan.lengths[explanation.longest]
    chosen = next(choice for choice in explanation.choices if choice.verdict is Verdict.CHOSEN)
    assert chosen.sequence_s is not None and chosen.rank_s is not None
    ranks = f"rank {group.first_rank}" if group.degree == 1 else f"ranks {group.first_rank}-{group.first_rank + group.degree - 1}"
    lines = [
        f"The longest sequence, {length:,} tokens (number {explanation.longest}), runs on {ranks}: "
        f"{group.degree} rank{'s' * (group.degree > 1)}, {chosen.reason}, {format_precise(chosen.sequence_s)}."
    ]
    small = [choice for choice in explanation.choices if choice.verdict is Verdict.TOO_SMALL]
    if small:
        lines.append(f"Fewer ranks are no choice: {small[-1].reason}.")
    for choice in explanation.choices:
        if choice.verdict is Verdict.POSSIBLE and choice.sequence_s is not None and choice.rank_s is not None:
            lines.append(_compared(choice, chosen.sequence_s, chosen.rank_s))
        elif choice.verdict is Verdict.EXCLUDED:
            lines.append(f"{choice.degree} ranks are out: {choice.reason}.")
    return lines


def _compared(choice: Choice, seconds: float, rank_s: float) -> str:
    assert choice.sequence_s is not None and choice.rank_s is not None
    on = f"On {choice.degree} rank{'s' * (choice.degree > 1)} ({choice.reason}) it would take {format_precise(choice.sequence_s)}"
    ratio, share = choice.sequence_s / seconds, choice.rank_s / rank_s
    cost = f"{choice.rank_s:,.4g} rank-seconds instead of {rank_s:,.4g}" if abs(share - 1) > _SAME else "as many rank-seconds"
    if ratio < 1 - _SAME and share > 1 + _SAME:
        return f"{on}, sooner, but {cost}: time the other sequences need."
    if ratio > 1 + _SAME and share < 1 - _SAME:
        return f"{on} and only {cost}, but its micro-batch would wait for it."
    if ratio < 1 - _SAME:
        return f"{on} and {cost}: better by itself; the other sequences decide."
    return f"{on} and {cost}: {'later for nothing' if ratio > 1 + _SAME else 'no gain'}."


def _next_words(explanation: Explanation) -> list[str]:
    other = explanation.next_best
    if other is None or other.predicted_s is None:
        return []
    return [
        f"Next best: kept off {explanation.group.degree}, it gets {other.longest_degree} ranks and the whole step, planned again, "
        f"takes {format_precise(other.predicted_s)}, {_more(other.predicted_s / explanation.line.step_s - 1, explanation.adaptive)}."
    ]


def _more(slower: float, adaptive: bool) -> str:
    if slower > _SAME / 2:
        return f"{slower:.1%} more"
    if slower > -_SAME / 2:
        return "no more than this plan"
    return f"{-slower:.1%} less: " + ("the search missed it" if adaptive else "this plan has one degree for all, that one has not")


def _other_words(explanation: Explanation) -> list[str]:
    parts = [
        f"{other.name} {format_precise(other.predicted_s)} ({other.predicted_s / explanation.line.step_s - 1:+.1%})"
        for other in explanation.alternatives
        if other.predicted_s is not None
    ]
    return [f"Other plans of this step: {', '.join(parts)}."] if parts else []


def _time_words(explanation: Explanation) -> list[str]:
    line = explanation.line
    parts = [f"work in groups {line.busy_share:.0%} of the step", f"wait for slower groups {line.waiting_share:.0%}"]
    if line.gather_share >= 0.005:
        why = "once, before anything runs" if line.barrier_free else "they take longer to gather than the groups to compute"
        parts.append(f"wait for weights {line.gather_share:.0%} ({why})")
    return [f"Ranks {', '.join(parts)}; {line.overhead_share:.0%} is the cost of having micro-batches and a step at all."]
