"""Plans for the batch that is there: the best of the shelf search and of every plan made without search."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from .bound import Bound, staircase_of, tightened_by
from .cost import CostModel
from .greedy import greedy_shelves, static_shelves
from .plan import StepPlan
from .shelves import ShelfSearch, squeezed
from .tables import Batch, Shelf

WORK_PER_SEQUENCE = 250
LEAST_WORK, MOST_WORK = 60_000, 640_000


def default_budget(num_sequences: int) -> int:
    """Sequences looked at: about 80 ms for 512 of them, and under a second for thousands, on one core of a laptop."""
    return min(MOST_WORK, max(LEAST_WORK, WORK_PER_SEQUENCE * num_sequences))


def adaptive_plan(lengths: Sequence[int], cost: CostModel, *, budget: int | None = None, wall_s: float | None = None) -> StepPlan:
    """The best plan found within `budget` units of work, with its staircase bound.

    Never slower in the model than a static plan of any degree, balanced packing, or the longest-first greedy. `wall_s` ends the
    search early; only then does the plan depend on the machine. PlanError for a sequence that no group holds.
    """
    batch = Batch(lengths, cost)
    if not len(batch):
        return StepPlan(cost.world_size, (), (), predicted_s=cost.step_s, lower_bound_s=cost.step_s, bound="staircase", source="adaptive")
    bound = staircase_of(batch)
    shelves, source = _without_search(batch)
    if not bound.valid:
        # Without sense in the times there is nothing to search by; the plan at least fits in memory.
        return batch.plan(shelves, source)
    until = None if wall_s is None else time.monotonic() + wall_s
    search = ShelfSearch(
        batch,
        default_budget(len(batch)) if budget is None else budget,
        batch.seconds(shelves) - cost.step_s,
        enough_s=bound.value_s - cost.step_s,
        expired=None if until is None else (lambda: time.monotonic() > until),
    )
    improved = search.run(tuple(shelf.load_s for shelf in shelves))
    if improved is not None:
        shelves, source = improved, "adaptive"
    else:
        shelves = [squeezed(batch, shelf) for shelf in shelves]
    plan = batch.plan(shelves, source)
    return bounded(plan, tightened_by(batch, bound, batch.seconds(shelves)))


def greedy_plan(lengths: Sequence[int], cost: CostModel) -> StepPlan:
    """Longest first, counting s^2 / ranks: what runs when no better plan is there in time."""
    batch = Batch(lengths, cost)
    if not len(batch):
        return StepPlan(cost.world_size, (), (), predicted_s=cost.step_s, source="greedy")
    return batch.plan(greedy_shelves(batch), "greedy")


def static_plan(lengths: Sequence[int], cost: CostModel) -> StepPlan:
    """The best plan that uses one degree for all sequences."""
    batch = Batch(lengths, cost)
    if not len(batch):
        return StepPlan(cost.world_size, (), (), predicted_s=cost.step_s, source="static")
    return batch.plan(min(static_shelves(batch), key=batch.seconds), "static")


def bounded(plan: StepPlan, bound: Bound) -> StepPlan:
    """The plan with the bound, where it holds and is tighter than the plan's own."""
    if not bound.valid or (plan.lower_bound_s is not None and plan.lower_bound_s >= bound.value_s):
        return plan
    return replace(plan, lower_bound_s=bound.value_s, bound=bound.name)


def _without_search(batch: Batch) -> tuple[list[Shelf], str]:
    """The best of greedy, static and balanced plans, and which it is."""
    greedy = greedy_shelves(batch)
    static = min(static_shelves(batch), key=batch.seconds)
    return (greedy, "greedy") if batch.seconds(greedy) <= batch.seconds(static) else (static, "static")
