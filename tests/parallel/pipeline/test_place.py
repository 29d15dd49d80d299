"""Which layers and virtual stages a pipeline rank has."""

from __future__ import annotations

from typing import Any

from efflaunch.parallel.pipeline.place import StagePart, StagePlace
from efflaunch.parallel.topology import PipelineRanks


def place(index: int, *layers: range) -> StagePlace:
    group: Any = None
    return StagePlace(layers, index, PipelineRanks((1, 3, 5), group, group, group, group))


def test_the_ends_are_on_the_first_and_the_last_rank() -> None:
    first, middle, last = place(0, range(2)), place(1, range(2, 5)), place(2, range(5, 6))
    assert first.parts == (StagePart(range(2), True, False),)
    assert middle.parts == (StagePart(range(2, 5), False, False),)
    assert last.parts == (StagePart(range(5, 6), False, True),)
    assert first.has_embedding and last.has_head and not (middle.has_embedding or middle.has_head)


def test_virtual_stages_are_dealt_out_in_turn() -> None:
    first, last = place(0, range(1), range(3, 4)), place(2, range(2, 3), range(5, 6))
    assert [part.first for part in first.parts] == [True, False] and not any(part.last for part in first.parts)
    assert [part.last for part in last.parts] == [False, True]
    assert first.num_stages == 6 and [first.part_of(stage) for stage in (0, 3)] == [0, 1] and last.part_of(5) == 1
