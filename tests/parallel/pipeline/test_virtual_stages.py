"""Generators with several stages a rank, for all small sizes: valid, in flight as published, and bubbles as published."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.pipeline.generators import gpipe, one_f_one_b, sliced_1f1b, zero_bubble
from efflaunch.parallel.pipeline.pipeline_plan import PipelineSchedule, check, least_depth, max_in_flight
from efflaunch.parallel.pipeline.simulate import PipelineTimeline, costs, simulate
from efflaunch.parallel.pipeline.virtual_stages import dual_pipe_v, interleaved, zbv
from efflaunch.tests.parallel.pipeline.random_problems import runs_to_the_end

SIZES = [(ranks, batches) for ranks in range(2, 7) for batches in range(1, 13)]


def timed(schedule: PipelineSchedule, **seconds: float) -> PipelineTimeline:
    return simulate(schedule, costs((schedule.num_stages, schedule.num_micro_batches, schedule.slices), **seconds))


def test_interleaved_divides_the_bubble_by_the_virtual_stages() -> None:
    for ranks, batches in SIZES:
        for virtual in (1, 2, 3):
            schedule = interleaved(ranks, batches, virtual)
            check(schedule)
            if batches % ranks == 0:
                # Seconds of a whole rank's work on one micro-batch are 3 for any number of virtual stages.
                one = 1 / virtual
                step_s = timed(schedule, forward_s=one, backward_s=one, weight_s=one).step_s
                assert step_s == pytest.approx(3 * batches + 3 * (ranks - 1) / virtual)
            if virtual > 1:
                most = [min(2 * (ranks - 1 - rank) + (virtual - 1) * ranks + 1, batches * virtual) for rank in range(ranks)]
                found = [max_in_flight(schedule, rank) for rank in range(ranks)]
                assert all(have <= limit for have, limit in zip(found, most, strict=True))
                assert batches % ranks or found == most
    assert interleaved(4, 6, 1) == one_f_one_b(4, 6) and interleaved(4, 6, 1, 3) == sliced_1f1b(4, 6, 3)


def test_slices_of_virtual_stages_run_to_the_end_with_the_bubble_of_both() -> None:
    for ranks, batches in SIZES:
        for virtual, slices in ((2, 2), (2, 3), (3, 2)):
            schedule = interleaved(ranks, batches, virtual, slices)
            check(schedule)
            if batches % -(-ranks // slices) == 0:
                one = 1 / (virtual * slices)
                step_s = timed(schedule, forward_s=one, backward_s=one, weight_s=one).step_s
                assert step_s == pytest.approx(3 * batches + 3 * (ranks - 1) / (virtual * slices))


def test_zbv_has_no_bubble_between_a_rank_s_first_and_last_unit() -> None:
    for ranks, batches in SIZES:
        schedule = zbv(ranks, batches)
        check(schedule)
        assert max(max_in_flight(schedule, rank) for rank in range(ranks)) <= 2 * ranks
        if batches >= 2 * ranks - 1:
            timeline = timed(schedule)
            assert timeline.step_s == pytest.approx(6 * batches + ranks - 1)
            for starts, ends, busy in zip(timeline.starts_s, timeline.ends_s, timeline.busy_s, strict=True):
                assert ends[-1] - starts[0] == pytest.approx(busy)
            assert timeline.peak_units == (2 * ranks,) * ranks


def test_dual_pipe_v_is_within_its_published_bubble_and_memory() -> None:
    for ranks, batches in SIZES:
        schedule = dual_pipe_v(ranks, batches)
        check(schedule)
        assert max(max_in_flight(schedule, rank) for rank in range(ranks)) <= 2 * ranks + 1
        for f, b, w in ((1.0, 1.0, 1.0), (1.0, 1.5, 0.75)) if batches >= 2 * ranks else ():
            # (PP / 2 - 1) (F&B + B - 3 W) with PP = 2 R stages and F&B = F + B; B holds the gradients of weights.
            bubble = (ranks - 1) * ((f + b + w) + (b + w) - 3 * w)
            timeline = timed(schedule, forward_s=f, backward_s=b, weight_s=w)
            assert max(timeline.busy_s) < timeline.step_s <= max(timeline.busy_s) + bubble + 1e-9


def test_every_rank_of_a_v_has_both_ends_of_it() -> None:
    for make in (zbv, dual_pipe_v):
        assert make(3, 4).stage_ranks == (0, 1, 2, 2, 1, 0) and make(3, 4).stages_of(0) == (0, 5)


def test_sends_without_a_buffer_need_receives_posted_ahead() -> None:
    assert least_depth(one_f_one_b(4, 8)) == 1
    for schedule in (interleaved(4, 8, 2), zbv(3, 6), dual_pipe_v(3, 6)):
        depth = least_depth(schedule)
        check(schedule, depth=depth, rendezvous=True)
        assert depth > 1
        with pytest.raises(PlanError, match="posts no receive of it"):
            check(schedule, depth=depth - 1, rendezvous=True)


def test_no_virtual_stage_is_refused() -> None:
    with pytest.raises(PlanError, match="0 virtual stages"):
        interleaved(2, 2, 0)


def test_permuted_orders_are_refused_exactly_where_they_hang() -> None:
    rng = random.Random(8)
    makers = (gpipe, one_f_one_b, zero_bubble, zbv, dual_pipe_v)
    sliced = (lambda ranks, batches: sliced_1f1b(ranks, batches, 2), lambda ranks, batches: interleaved(ranks, batches, 2, 2))
    ended = []
    for make in (*makers, *sliced):
        for _ in range(60):
            schedule = make(rng.randint(2, 4), rng.randint(1, 5))
            orders = [list(order) for order in schedule.orders]
            for _ in range(rng.randint(1, 3)):
                order = rng.choice(orders)
                at = rng.randrange(len(order))
                order.insert(max(0, at + rng.randint(-3, 3)), order.pop(at))
            permuted = replace(schedule, orders=tuple(map(tuple, orders)))
            ended.append(runs_to_the_end(permuted, rng))
            if ended[-1]:
                check(permuted)
            else:
                with pytest.raises(PlanError, match="for ever"):
                    check(permuted)
    assert 100 < sum(ended) < len(ended) - 100
