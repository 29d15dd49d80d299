"""Where parameters lie in ZeRO's flat buffers: every number once, whatever the ranks; what does not fit is said."""

from __future__ import annotations

import math

import numpy as np
import pytest

from efflaunch.model.zero_layout import LayoutError, Run, Shape, runs_of_groups, runs_of_partitions

GROUPS: list[dict[str, Shape]] = [{"a": (5, 3), "b": (4,), "c": (2, 2)}, {"d": (7,), "e": ()}]


def flat(shapes: dict[str, Shape], at: float) -> np.ndarray:
    """Numbers of parameters one behind the other, each its own."""
    return at + np.arange(sum(math.prod(shape) for shape in shapes.values()), dtype=float)


def gather(runs: tuple[Run, ...], buffers: list[list[np.ndarray]], count: int) -> np.ndarray:
    whole = np.full(count, np.nan)
    for run in runs:
        whole[run.begin : run.begin + run.count] = buffers[run.rank][run.buffer][run.first : run.first + run.count]
    return whole


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("is_padded", [True, False])
def test_groups_are_cut_evenly_over_ranks(ranks: int, is_padded: bool) -> None:
    wholes = [flat(shapes, 100.0 * index) for index, shapes in enumerate(GROUPS)]
    padded = [np.pad(whole, (0, -len(whole) % (2 * ranks)), constant_values=-1) for whole in wholes]
    buffers = [[part.reshape(ranks, -1)[rank] for part in padded] for rank in range(ranks)]
    if not is_padded:
        for index, whole in enumerate(wholes):
            size = len(padded[index]) // ranks
            for rank in range(ranks):
                buffers[rank][index] = buffers[rank][index][: max(0, min(size, len(whole) - size * rank))]
    runs = runs_of_groups(GROUPS, [[len(each) for each in own] for own in buffers])
    for whole, shapes in zip(wholes, GROUPS, strict=True):
        at = 0
        for name, shape in shapes.items():
            count = math.prod(shape)
            assert np.array_equal(gather(runs[name], buffers, count), whole[at : at + count])
            at += count


def test_numbers_behind_each_parameter_are_left_out() -> None:
    runs = runs_of_groups([{"a": (3,), "b": (2,)}], [[4], [4]], [[1, 2]])
    assert runs == {"a": (Run(0, 0, 0, 3, 0),), "b": (Run(1, 0, 0, 2, 0),)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 20])
@pytest.mark.parametrize("buffer", [1000, 6])
def test_each_parameter_is_cut_evenly_over_ranks(ranks: int, buffer: int) -> None:
    """In one buffer a rank, or in several whose ends are nowhere special."""
    shapes = {name: shape for group in GROUPS for name, shape in group.items()}
    wholes = {name: flat({name: shape}, 100.0 * index) for index, (name, shape) in enumerate(shapes.items())}
    parts = [np.pad(whole, (0, -len(whole) % ranks), constant_values=-1).reshape(ranks, -1) for whole in wholes.values()]
    tapes = [np.concatenate([part[rank] for part in parts]) for rank in range(ranks)]
    buffers = [np.split(tape, range(buffer, len(tape), buffer)) for tape in tapes]
    runs = runs_of_partitions(shapes, [[len(each) for each in own] for own in buffers])
    assert all(np.array_equal(gather(runs[name], buffers, len(whole)), whole) for name, whole in wholes.items())


@pytest.mark.parametrize(
    ("groups", "lengths", "found"),
    [
        ([{"a": (9,)}], [[4], [4]], "ends at number 9"),
        ([{"a": (3,)}], [[4], [4]], "8 numbers in the buffers of group 0, and 3"),
        ([{"a": (4,)}, {"b": (4,)}], [[4]], "2 groups of parameters"),
    ],
)
def test_groups_of_another_checkpoint_are_refused(groups: list[dict[str, Shape]], lengths: list[list[int]], found: str) -> None:
    with pytest.raises(LayoutError, match=found):
        runs_of_groups(groups, lengths)


def test_partitions_of_other_ranks_are_refused() -> None:
    with pytest.raises(LayoutError, match="5 numbers in the buffers of rank 0, and 4"):
        runs_of_partitions({"a": (8,)}, [[5], [5]])
    with pytest.raises(LayoutError, match="ends at number"):
        runs_of_partitions({"a": (8,)}, [[3], [3]])
