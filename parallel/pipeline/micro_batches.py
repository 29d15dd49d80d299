"""Plans of a step for several stages: more and smaller micro-batches than one stage would have, where that fills the pipeline. Pure.

A step takes its micro-batches one after the other, and the longest of them once more for every stage beyond the first. Solvers open as
few micro-batches as memory allows; here they are asked again with less room for each, and the plan that takes least is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..sequence.cost import CostModel
    from ..sequence.plan import StepPlan

Solve = Callable[[Sequence[int], "CostModel"], "StepPlan"]
FILLS = (1, 2, 4)
"""Micro-batches over stages that are tried."""
SLACK = 1.15
"""Room of a micro-batch over the mean of its tokens: sequences do not divide."""


def plan_for_stages(lengths: Sequence[int], cost: CostModel, solve: Solve, *, longest_group: int, least: int | None = None) -> StepPlan:
    """The plan that `solve` makes with the room per rank that takes least over all stages, priced; `solve`'s own with one stage.

    `longest_group`: ranks of the largest group that `solve` uses. `least`: at least so many micro-batches where sequences suffice (None:
    as many as take least). PlanError as `solve` raises it. Its lower bound, of one stage's work, holds for all of them.
    """
    plan = solve(lengths, cost)
    if cost.num_stages == 1:
        return plan
    best, bound = cost.priced(plan), plan
    for room in _rooms(lengths, cost, longest_group, least):
        other = cost.priced(solve(lengths, replace(cost, tokens_per_rank=room)))
        if _key(other, least) < _key(best, least):
            best = other
    return replace(best, lower_bound_s=bound.lower_bound_s, bound=bound.bound)


def _key(plan: StepPlan, least: int | None) -> tuple[int, float, int]:
    """Missing micro-batches first, then time, then how many there are."""
    assert plan.predicted_s is not None
    return max(0, (least or 0) - len(plan.micro_batches)), plan.predicted_s, len(plan.micro_batches)


def _rooms(lengths: Sequence[int], cost: CostModel, longest_group: int, least: int | None) -> list[int]:
    """Tokens a rank may hold in a micro-batch, largest first: down to what the longest sequence needs in the largest group."""
    tokens, needed = sum(lengths), -(-max(lengths, default=1) // longest_group)
    counts = [fill * cost.num_stages for fill in FILLS] + ([least] if least is not None else [])
    rooms = {max(needed, round(SLACK * tokens / (count * cost.world_size))) for count in counts}
    rooms |= set() if least is None else {needed}
    return sorted((room for room in rooms if 0 < room < cost.tokens_per_rank), reverse=True)
