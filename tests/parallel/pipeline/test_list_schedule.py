"""Orders made for their costs: valid, within memory, and 1F1B's where all units are equal."""

from __future__ import annotations

import numpy as np
import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.pipeline.generators import one_f_one_b, zero_bubble
from efflaunch.parallel.pipeline.list_schedule import list_schedule
from efflaunch.parallel.pipeline.pipeline_plan import check
from efflaunch.parallel.pipeline.simulate import costs, simulate


def test_orders_are_valid_and_within_memory() -> None:
    rng = np.random.default_rng(0)
    for owners in ((0,), (0, 1), (0, 1, 2), (0, 1, 0, 1), (0, 1, 2, 2, 1, 0)):
        for slices in (1, 3):
            for split in (False, True):
                shape = len(owners), 6, slices
                size = rng.uniform(0.2, 3, (1, 6, slices))
                table = costs(shape, forward_s=size, backward_s=size, weight_s=size, held_bytes=size, weight_bytes=size, alpha_s=0.1)
                # Room for the largest two micro-batches in all stages of a rank.
                cap = 2 * float(size.sum(axis=2).max()) * len(owners) / (max(owners) + 1)
                made = list_schedule(owners, table, (cap,) * (max(owners) + 1), split=split)
                check(made)
                timeline = simulate(made, table)
                assert max(timeline.peak_bytes) <= cap * (1 + 1e-9) and bool(made.split) == split
                assert timeline.step_s >= max(timeline.busy_s) - 1e-9


def test_equal_units_come_out_as_fast_as_1f1b() -> None:
    for ranks, batches in ((2, 5), (4, 8), (4, 3)):
        table = costs((ranks, batches, 1))
        made = list_schedule(range(ranks), table, [float(ranks)] * ranks, split=False)
        assert simulate(made, table).step_s == pytest.approx(simulate(one_f_one_b(ranks, batches), table).step_s)


def test_many_unequal_units_come_out_faster_than_published_orders() -> None:
    size = (np.random.default_rng(0).pareto(1.5, 32) + 0.3)[None, :, None]
    for make in (one_f_one_b, zero_bubble):
        published = make(8, 32)
        table = costs((8, 32, 1), forward_s=size, backward_s=size, weight_s=size, held_bytes=size)
        before = simulate(published, table)
        made = list_schedule(range(8), table, (max(before.peak_bytes) * (1 + 1e-9),) * 8, split=bool(published.split))
        after = simulate(made, table)
        assert after.step_s < 0.97 * before.step_s and max(after.peak_bytes) <= max(before.peak_bytes) * (1 + 1e-6)


def test_no_room_is_named() -> None:
    with pytest.raises(PlanError, match="no room for a micro-batch"):
        list_schedule((0, 1), costs((2, 1, 1), held_bytes=5.0), (10.0, 4.0), split=False)
    # Backward needs all slices of a micro-batch.
    with pytest.raises(PlanError, match="no room for a micro-batch"):
        list_schedule((0, 1), costs((2, 1, 3)), (2.0, 2.0), split=False)
