"""What each pipeline rank does in a step: every order for every size, proven not to hang."""

from __future__ import annotations

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.pipeline.config import PipelineOrder
from efflaunch.parallel.pipeline.pipeline_plan import ActionKind, UnitKind, max_in_flight
from efflaunch.parallel.pipeline.step_actions import step_actions, step_schedule

GPIPE, ONE, INTERLEAVED = PipelineOrder.GPIPE, PipelineOrder.ONE_F_ONE_B, PipelineOrder.INTERLEAVED
ZERO = PipelineOrder.ZERO_BUBBLE


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize(("order", "virtual"), [(ONE, 1), (GPIPE, 1), (INTERLEAVED, 2), (INTERLEAVED, 3), (ZERO, 1)])
def test_every_rank_makes_every_pass_once(order: PipelineOrder, virtual: int, micro_batches: int, ranks: int) -> None:
    for rank, actions in enumerate(step_actions(order, ranks, virtual, micro_batches, 3)):
        for kind in (UnitKind.FORWARD, UnitKind.BACKWARD):
            passes = [(a.unit.stage, a.unit.micro_batch) for a in actions if a.kind is ActionKind.COMPUTE and a.unit.kind is kind]
            assert sorted(passes) == [(stage, m) for stage in range(rank, ranks * virtual, ranks) for m in range(micro_batches)]


def test_gpipe_goes_in_lots_of_what_may_be_in_flight() -> None:
    schedule = step_schedule(GPIPE, 2, 1, 5, 2)
    assert " ".join(map(str, schedule.orders[0])) == "0F0 0F1 0B1 0B0 0F2 0F3 0B3 0B2 0F4 0B4"
    assert [max_in_flight(schedule, rank) for rank in range(2)] == [2, 2]


def test_one_forward_one_backward_holds_fewer_the_later_the_stage() -> None:
    schedule = step_schedule(ONE, 4, 1, 9, 1)
    assert [max_in_flight(schedule, rank) for rank in range(4)] == [4, 3, 2, 1]


def test_zero_bubble_puts_off_as_many_weight_gradients_as_its_rank_says() -> None:
    schedule = step_schedule(ZERO, 3, 1, 4, 1)
    assert " ".join(map(str, schedule.orders[2])) == "2F0 2B0 2F1 2B1 2F2 2B2 2W0 2F3 2B3 2W1 2W2 2W3"
    assert [max_in_flight(schedule, rank) for rank in range(3)] == [3, 3, 3]


def test_only_interleaved_ranks_have_virtual_stages() -> None:
    with pytest.raises(PlanError, match="virtual"):
        step_schedule(ONE, 2, 2, 4, 1)
