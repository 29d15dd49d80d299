"""What each pipeline rank does in a step, from the configured order: units, sends and receives, proven not to hang. Pure."""

from __future__ import annotations

from functools import lru_cache

from ...errors import PlanError
from .config import PipelineOrder
from .generators import gpipe, make, one_f_one_b, zero_bubble
from .pipeline_plan import Actions, PipelineSchedule, Unit, check_actions, with_transfers
from .virtual_stages import interleaved

DEPTH = {PipelineOrder.ONE_F_ONE_B: 1, PipelineOrder.GPIPE: 1, PipelineOrder.INTERLEAVED: 2, PipelineOrder.ZERO_BUBBLE: 1}
"""Receives are posted so many units ahead: with fewer, sends that wait for their receive could hang."""


@lru_cache(maxsize=64)  # steps have few different numbers of micro-batches
def step_actions(order: PipelineOrder, ranks: int, virtual: int, micro_batches: int, most_in_flight: int) -> Actions:
    """The actions of every pipeline rank. `most_in_flight`: micro-batches of GPipe that go forward before the first goes backward.

    PlanError where they would hang: they run to the end with sends that wait for their receive, hence with any.
    """
    schedule = step_schedule(order, ranks, virtual, micro_batches, most_in_flight)
    actions = with_transfers(schedule, DEPTH[order])
    check_actions(schedule, actions, rendezvous=True)
    return actions


def step_schedule(order: PipelineOrder, ranks: int, virtual: int, micro_batches: int, most_in_flight: int) -> PipelineSchedule:
    """The units of every pipeline rank, as `step_actions`."""
    if order is PipelineOrder.INTERLEAVED:
        return interleaved(ranks, micro_batches, virtual)
    if virtual != 1:
        expected = f"1 with {order.value}: only interleaved ranks have several"
        raise PlanError("pipeline schedule", found=f"{virtual} virtual stages", expected=expected, hint="interleaved")
    if order is PipelineOrder.GPIPE:
        return _gpipe_in_turns(ranks, micro_batches, most_in_flight)
    return zero_bubble(ranks, micro_batches) if order is PipelineOrder.ZERO_BUBBLE else one_f_one_b(ranks, micro_batches)


def _gpipe_in_turns(ranks: int, micro_batches: int, most: int) -> PipelineSchedule:
    """GPipe of `most` micro-batches at a time, one lot after the other."""
    orders: list[list[Unit]] = [[] for _ in range(ranks)]
    for first in range(0, micro_batches, most):
        lot = gpipe(ranks, min(most, micro_batches - first))
        for rank, order in enumerate(lot.orders):
            orders[rank] += [Unit(unit.kind, unit.stage, first + unit.micro_batch) for unit in order]
    return make(ranks, range(ranks), micro_batches, orders)
