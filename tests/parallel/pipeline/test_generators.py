"""Generators with one stage a rank, for all small sizes: valid, in flight as published, and bubbles as published."""

from __future__ import annotations

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.pipeline.generators import gpipe, one_f_one_b, sliced_1f1b, zero_bubble
from efflaunch.parallel.pipeline.pipeline_plan import PipelineSchedule, UnitKind, check, max_in_flight
from efflaunch.parallel.pipeline.simulate import costs, simulate

SIZES = [(ranks, batches) for ranks in range(1, 7) for batches in range(1, 13)]
F_S, B_S, W_S = 1.0, 1.25, 0.75


def step_s(schedule: PipelineSchedule) -> float:
    shape = schedule.num_stages, schedule.num_micro_batches, schedule.slices
    return simulate(schedule, costs(shape, forward_s=F_S, backward_s=B_S, weight_s=W_S)).step_s


@pytest.mark.parametrize("make", [gpipe, one_f_one_b, zero_bubble])
def test_every_small_schedule_runs_to_the_end(make) -> None:
    for ranks, batches in SIZES:
        check(make(ranks, batches))
        check(make(ranks, batches), rendezvous=True)
    assert len(SIZES) == 72


def test_gpipe_has_its_bubble_and_all_micro_batches() -> None:
    for ranks, batches in SIZES:
        schedule = gpipe(ranks, batches)
        assert step_s(schedule) == pytest.approx((batches + ranks - 1) * (F_S + B_S + W_S))
        assert [max_in_flight(schedule, rank) for rank in range(ranks)] == [batches] * ranks


def test_1f1b_has_gpipe_s_bubble_and_few_micro_batches() -> None:
    for ranks, batches in SIZES:
        schedule = one_f_one_b(ranks, batches)
        assert step_s(schedule) == pytest.approx((batches + ranks - 1) * (F_S + B_S + W_S))
        assert [max_in_flight(schedule, rank) for rank in range(ranks)] == [min(ranks - rank, batches) for rank in range(ranks)]


def test_zero_bubble_has_its_bubble_and_the_memory_of_1f1b() -> None:
    for ranks, batches in SIZES:
        schedule = zero_bubble(ranks, batches)
        assert max(max_in_flight(schedule, rank) for rank in range(ranks)) == min(ranks, batches)
        assert all(sum(unit.kind is UnitKind.WEIGHT for unit in order) == batches for order in schedule.orders)
        if batches >= ranks:
            timeline = simulate(schedule, costs((ranks, batches, 1)))
            assert timeline.step_s == pytest.approx(3 * batches + (ranks - 1) * (1 + 1 - 1))
        assert step_s(schedule) <= step_s(one_f_one_b(ranks, batches)) + 1e-9


def test_slices_shrink_the_bubble_and_what_waits() -> None:
    for ranks, batches in SIZES:
        for slices in (1, 2, 3, 4):
            schedule = sliced_1f1b(ranks, batches, slices)
            check(schedule)
            expected = [min(ranks - rank + slices - 1, batches * slices) for rank in range(ranks)]
            assert [max_in_flight(schedule, rank) for rank in range(ranks)] == expected
            assert step_s(schedule) == pytest.approx((batches * slices + ranks - 1) * (F_S + B_S + W_S))
    assert sliced_1f1b(4, 6, 1) == one_f_one_b(4, 6)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(PlanError, match="1 or more of each"):
        sliced_1f1b(*sizes)
