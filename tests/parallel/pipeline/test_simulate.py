"""Schedules in time: by hand where they are short, and GPipe's published formulas."""

from __future__ import annotations

import random

import numpy as np
import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.pipeline.generators import gpipe, one_f_one_b, sliced_1f1b, zero_bubble
from efflaunch.parallel.pipeline.pipeline_plan import PipelineSchedule, Unit, UnitKind
from efflaunch.parallel.pipeline.pipeline_text import parse
from efflaunch.parallel.pipeline.simulate import PipelineCosts, costs, simulate
from efflaunch.parallel.pipeline.virtual_stages import zbv


def test_gpipe_s_bubble() -> None:
    for stages in (1, 2, 4, 8):
        for batches in (1, 4, 32):
            timeline = simulate(gpipe(stages, batches), costs((stages, batches, 1), forward_s=2.0, backward_s=3.0, weight_s=1.0))
            expected = (stages - 1) / (batches + stages - 1)
            assert timeline.bubble_share == pytest.approx(expected)
            assert timeline.bubble_shares == pytest.approx([expected] * stages)


def test_gpipe_s_peak_memory() -> None:
    """O(N + L / K x N / M): inputs of a stage for the whole batch of N rows, and its L / K layers for one micro-batch."""
    layers, rows = 48, 64
    for stages in (1, 2, 4, 8):
        for batches in (1, 4, 32):
            one = rows / batches
            timeline = simulate(gpipe(stages, batches), costs((stages, batches, 1), held_bytes=one, work_bytes=layers / stages * one))
            assert timeline.peak_bytes == pytest.approx([rows + layers / stages * rows / batches] * stages)
            # Without: O(N x L) over the stages.
            kept = simulate(gpipe(stages, batches), costs((stages, batches, 1), held_bytes=layers / stages * one))
            assert kept.peak_bytes == pytest.approx([layers * rows / stages] * stages)


def test_units_start_when_what_they_need_has_come() -> None:
    schedule = one_f_one_b(2, 2)
    timeline = simulate(
        schedule, costs((2, 2, 1), forward_s=1.0, backward_s=2.0, weight_s=0.0, output_bytes=4.0, alpha_s=0.5, s_per_byte=0.25)
    )
    # Messages take 1.5 s.
    assert timeline.starts_s == ((0.0, 1.0, 7.0, 10.0), (2.5, 3.5, 5.5, 6.5))
    assert timeline.ends_s == ((1.0, 2.0, 9.0, 12.0), (3.5, 5.5, 6.5, 8.5))
    assert timeline.step_s == 12.0 and timeline.busy_s == (6.0, 6.0) and timeline.bubble_share == 0.5
    assert [(timed.unit, timed.rank, timed.start_s) for timed in timeline.units][5] == (Unit(UnitKind.BACKWARD, 1, 0), 1, 3.5)


def test_messages_of_a_pair_of_ranks_go_one_after_the_other() -> None:
    timeline = simulate(one_f_one_b(2, 2), costs((2, 2, 1), alpha_s=5.0))
    # The second leaves rank 0 at 2 and waits for the first, which comes at 6.
    starts = {str(timed.unit): timed.start_s for timed in timeline.units}
    assert starts["1F0"] == 6.0 and starts["1F1"] == 11.0


def longest_way(schedule: PipelineSchedule, table: PipelineCosts) -> float:
    """Step time by relaxing every edge until nothing changes: messages do not queue."""
    ends: dict[Unit, float] = {}
    for _ in range(sum(map(len, schedule.orders)) + 1):
        before = dict(ends)
        for order in schedule.orders:
            free = 0.0
            for unit in order:
                at = unit.stage, unit.micro_batch, unit.slice
                start = free
                for need in schedule.needs(unit):
                    apart = schedule.stage_ranks[need.stage] != schedule.stage_ranks[unit.stage]
                    start = max(start, ends.get(need, 0.0) + (table.alpha_s if apart else 0.0))
                whole = unit.kind is UnitKind.BACKWARD and unit not in schedule.split
                by_kind = {UnitKind.FORWARD: table.forward_s, UnitKind.BACKWARD: table.backward_s, UnitKind.WEIGHT: table.weight_s}
                ends[unit] = free = start + by_kind[unit.kind][at] + (table.weight_s[at] if whole else 0.0)
        if ends == before:
            return max(ends.values())
    raise AssertionError("does not settle")


@pytest.mark.parametrize("make", [gpipe, one_f_one_b, zero_bubble, zbv, lambda ranks, batches: sliced_1f1b(ranks, batches, 3)])
def test_unequal_units_take_the_longest_way(make) -> None:
    rng = np.random.default_rng(0)
    for ranks, batches in ((1, 3), (2, 4), (3, 5), (4, 3)):
        schedule = make(ranks, batches)
        shape = schedule.num_stages, batches, schedule.slices
        forward, backward, weight = rng.uniform(1, 2, (3, *shape))
        # Shorter than any unit, so that messages do not queue.
        table = costs(shape, forward_s=forward, backward_s=backward, weight_s=weight, alpha_s=0.3)
        assert simulate(schedule, table).step_s == pytest.approx(longest_way(schedule, table))


def test_peak_bytes_follow_the_order() -> None:
    schedule = parse("ranks 1 stages 0 micro-batches 2 slices 1\n0F0 0F1 0B0 0B1 0W1")
    table = costs((1, 2, 1), held_bytes=[[[10.0], [4.0]]], weight_bytes=3.0, work_bytes=[[[1.0], [9.0]]], fixed_bytes=100.0)
    # F1 runs with both held and 9 of work.
    assert simulate(schedule, table).peak_bytes == (100 + 14 + 9,)
    table = costs((1, 2, 1), held_bytes=[[[1.0], [1.0]]], weight_bytes=30.0)
    # After B1, 30 wait for W1, beside nothing; a unit that is not split leaves nothing. Peaks are taken while units run.
    assert simulate(schedule, table).peak_bytes == (2.0,)
    later = parse("ranks 1 stages 0 micro-batches 2 slices 1\n0F0 0B0 0F1 0W0 0B1")
    assert simulate(later, costs((1, 2, 1), held_bytes=10.0, weight_bytes=7.0)).peak_bytes == (17.0,)


def test_what_cannot_run_is_named() -> None:
    with pytest.raises(PlanError, match=r"0B0 for ever"):
        simulate(parse("ranks 1 stages 0 micro-batches 1 slices 1\n0B0 0F0"), costs((1, 1, 1)))
    with pytest.raises(PlanError, match=r"found \(2, 2, 1\) for a schedule of \(2, 3, 1\)"):
        simulate(one_f_one_b(2, 3), costs((2, 2, 1)))


def test_a_step_is_never_shorter_than_its_busiest_rank() -> None:
    rng = random.Random(5)
    for _ in range(20):
        ranks, batches = rng.randint(1, 4), rng.randint(1, 6)
        timeline = simulate(zero_bubble(ranks, batches), costs((ranks, batches, 1), forward_s=rng.uniform(0.5, 2)))
        assert max(timeline.busy_s) <= timeline.step_s + 1e-9 and all(-1e-9 <= share < 1 for share in timeline.bubble_shares)
