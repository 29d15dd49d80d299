"""Every generator, for all small sizes: valid under both kinds of sends, and with as many units in flight as published."""

from __future__ import annotations

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.pipeline.generators import gpipe, one_f_one_b
from efflaunch.parallel.pipeline.pipeline_plan import check, max_in_flight

SIZES = [(ranks, batches) for ranks in range(1, 7) for batches in range(1, 13)]


@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
def test_every_small_schedule_runs_to_the_end(make) -> None:
    for ranks, batches in SIZES:
        check(make(ranks, batches))
        check(make(ranks, batches), rendezvous=True)
    assert len(SIZES) == 72


def test_in_flight_is_as_published() -> None:
    for ranks, batches in SIZES:
        assert [max_in_flight(gpipe(ranks, batches), rank) for rank in range(ranks)] == [batches] * ranks
        expected = [min(ranks - rank, batches) for rank in range(ranks)]
        assert [max_in_flight(one_f_one_b(ranks, batches), rank) for rank in range(ranks)] == expected


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(PlanError, match="1 or more of each"):
        gpipe(*sizes)
