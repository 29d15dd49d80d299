"""Plans of a step for several stages: more and smaller micro-batches than one stage would have, where that fills the pipeline. Pure.

A step takes its micro-batches one after the other, and the longest of them once more for every stage beyond the first. Solvers open as
few micro-batches as memory allows; here they are asked again with less room for each, the plan that takes least is kept, and its
longest micro-batches are halved as long as that helps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..sequence.cost import CostModel
    from ..sequence.plan import Group, MicroBatch, StepPlan

Solve = Callable[[Sequence[int], "CostModel"], "StepPlan"]
FILLS = (1, 2, 4)
"""Micro-batches over stages that are tried."""
SLACK = 1.15
"""Room of a micro-batch over the mean of its tokens: sequences do not divide."""


def plan_for_stages(lengths: Sequence[int], cost: CostModel, solve: Solve, *, longest_group: int, least: int | None = None) -> StepPlan:
    """The plan that takes least over all stages, made by `solve` with some room per rank, priced; `solve`'s own with one stage.

    `longest_group`: ranks of the largest group that `solve` uses. `least`: at least so many micro-batches where sequences suffice (None:
    as many as take least). PlanError as `solve` raises it. Its lower bound, of one stage's work, holds for all of them.
    """
    plan = solve(lengths, cost)
    if cost.num_stages == 1:
        return plan
    rooms = _rooms(lengths, cost, longest_group, least)
    plans = [plan, *(solve(lengths, replace(cost, tokens_per_rank=room)) for room in rooms)]
    best = min((_halved(cost.priced(each), cost, least) for each in plans), key=lambda each: _key(each, least))
    return replace(best, lower_bound_s=plan.lower_bound_s, bound=plan.bound)


def _key(plan: StepPlan, least: int | None) -> tuple[int, float, int]:
    """Missing micro-batches first, then time, then how many there are."""
    assert plan.predicted_s is not None
    return max(0, (least or 0) - len(plan.micro_batches)), plan.predicted_s, len(plan.micro_batches)


def _rooms(lengths: Sequence[int], cost: CostModel, longest_group: int, least: int | None) -> list[int]:
    """Tokens a rank may hold in a micro-batch, largest first: down to what the longest sequence needs in the largest group."""
    tokens, needed = sum(lengths), -(-max(lengths, default=1) // longest_group)
    counts = [fill * cost.num_stages for fill in FILLS] + ([least] if least is not None else [])
    rooms = {max(needed, round(SLACK * tokens / (count * cost.world_size))) for count in counts}
    return sorted((room for room in rooms if 0 < room < cost.tokens_per_rank), reverse=True)


def _halved(plan: StepPlan, cost: CostModel, least: int | None) -> StepPlan:
    """The plan with its longest micro-batches cut in two, as long as the step gets shorter or there are too few."""
    while True:
        order = sorted(range(len(plan.micro_batches)), key=lambda index: -cost.micro_batch_s(plan.micro_batches[index], plan.lengths))
        index = next((index for index in order if any(len(group.sequences) > 1 for group in plan.micro_batches[index].groups)), None)
        if index is None:
            return plan
        batches, halves = plan.micro_batches, _halves(plan.micro_batches[index], plan.lengths, cost)
        cut = cost.priced(replace(plan, micro_batches=(*batches[:index], *halves, *batches[index + 1 :])))
        if _key(cut, least) >= _key(plan, least):
            return plan
        plan = cut


def _halves(batch: MicroBatch, lengths: Sequence[int], cost: CostModel) -> tuple[MicroBatch, MicroBatch]:
    """Two micro-batches of the same groups with half the work of each; a group of one sequence is in the first alone."""
    first: list[Group] = []
    second: list[Group] = []
    for group in batch.groups:
        seconds = dict(zip(group.sequences, cost.sequence_s([lengths[i] for i in group.sequences], group.degree).tolist(), strict=True))
        halves: tuple[list[int], list[int]] = ([], [])
        for sequence in sorted(seconds, key=lambda sequence: (-seconds[sequence], sequence)):
            min(halves, key=lambda half: sum(seconds[other] for other in half)).append(sequence)
        for groups, half in zip((first, second), halves, strict=True):
            groups += [replace(group, sequences=tuple(sorted(half)))] if half else []
    return replace(batch, groups=tuple(first)), replace(batch, groups=tuple(second))
