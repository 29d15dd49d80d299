"""Pipeline schedules with one stage a rank: GPipe, 1F1B, zero bubble, and 1F1B of slices. Pure.

Every order is the published one, and is valid for any number of micro-batches: where a schedule is published for more of them, or for
multiples of something, it is made for so many and the surplus is left out, which keeps every dependency.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ...errors import PlanError
from .pipeline_plan import PipelineSchedule, Unit, UnitKind

F, B, W = UnitKind.FORWARD, UnitKind.BACKWARD, UnitKind.WEIGHT


def gpipe(ranks: int, micro_batches: int) -> PipelineSchedule:
    """All forward passes, then all backward passes from the last micro-batch to the first (GPipe, arXiv 1811.06965, figure 2).

    Every rank holds all micro-batches at one time: of each only the stage's input, where stages recompute.
    """
    orders = [
        [*(Unit(F, rank, m) for m in range(micro_batches)), *(Unit(B, rank, m) for m in reversed(range(micro_batches)))]
        for rank in range(ranks)
    ]
    return make(ranks, range(ranks), micro_batches, orders)


def one_f_one_b(ranks: int, micro_batches: int) -> PipelineSchedule:
    """One forward, one backward: rank r holds min(ranks - r, micro-batches) at most (PipeDream-Flush, arXiv 2006.09503)."""
    orders = []
    for rank in range(ranks):
        forward = [Unit(F, rank, m) for m in range(micro_batches)]
        backward = [Unit(B, rank, m) for m in range(micro_batches)]
        orders.append(alternate(forward, backward, warm_up=ranks - 1 - rank))
    return make(ranks, range(ranks), micro_batches, orders)


def zero_bubble(ranks: int, micro_batches: int) -> PipelineSchedule:
    """1F1B whose gradients of weights come later and fill the bubbles: rank r defers r of them (ZB-H1, arXiv 2401.10241, section 2.1).

    No rank holds more micro-batches than rank 0 does under 1F1B: min(ranks, micro-batches).
    """
    orders = []
    for rank, whole in enumerate(one_f_one_b(ranks, micro_batches).orders):
        order: list[Unit] = []
        deferred: deque[Unit] = deque()
        for unit in whole:
            order.append(unit)
            if unit.kind is B:
                deferred.append(unit.with_kind(W))
                order += [deferred.popleft()] if len(deferred) > rank else []
        orders.append([*order, *deferred])
    return make(ranks, range(ranks), micro_batches, orders)


def sliced_1f1b(ranks: int, micro_batches: int, slices: int) -> PipelineSchedule:
    """1F1B whose units are slices of micro-batches: forward in their order, backward in reverse (Seq1F1B, arXiv 2406.03488).

    Rank r holds min(ranks - r + slices - 1, all) slices at most. Their sizes are those of `slices.py`: even in work, not in tokens.
    """
    orders = []
    for rank in range(ranks):
        pieces = [(m, j) for m in range(micro_batches) for j in range(slices)]
        forward = [Unit(F, rank, m, j) for m, j in pieces]
        backward = [Unit(B, rank, m, slices - 1 - j) for m, j in pieces]
        orders.append(alternate(forward, backward, warm_up=ranks - 1 - rank + slices - 1))
    return make(ranks, range(ranks), micro_batches, orders, slices)


def alternate(forward: Sequence[Unit], backward: Sequence[Unit], warm_up: int) -> list[Unit]:
    """`warm_up` forward passes, then one forward and one backward by turns, then the backward passes that are left."""
    warm_up = min(warm_up, len(forward))
    paired = [unit for pair in zip(forward[warm_up:], backward, strict=False) for unit in pair]
    return [*forward[:warm_up], *paired, *backward[len(forward) - warm_up :]]


def make(ranks: int, stage_ranks: Sequence[int], micro_batches: int, orders: Sequence[Sequence[Unit]], slices: int = 1) -> PipelineSchedule:
    """A schedule of orders, less units of micro-batches that there are not. PlanError for a size below 1."""
    if min(ranks, micro_batches, slices) < 1:
        found = f"{ranks} ranks, {micro_batches} micro-batches, {slices} slices"
        raise PlanError("pipeline schedule", found=found, expected="1 or more of each", hint="2 ranks and 8 micro-batches")
    return PipelineSchedule(
        num_stages=len(stage_ranks),
        num_ranks=ranks,
        stage_ranks=tuple(stage_ranks),
        num_micro_batches=micro_batches,
        slices=slices,
        orders=tuple(tuple(unit for unit in order if unit.micro_batch < micro_batches) for order in orders),
    )
