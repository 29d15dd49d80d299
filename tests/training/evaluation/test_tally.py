"""Sums by context, and on either side of a border."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from efflaunch.training.evaluation.tally import Tally

ROWS = st.lists(st.tuples(st.floats(-20, 0), st.integers(0, 1 << 21), st.booleans()), max_size=40)


def columns(rows):
    losses, positions, counts = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    return np.array(losses, dtype=np.float64), np.array(positions, dtype=np.int64), np.array(counts, dtype=bool)


@given(ROWS, ROWS, st.integers(1, 1 << 20))
def test_sums_are_those_of_a_loop(first, second, border):
    tally = Tally(border)
    tally.add(*columns(first))
    tally.add(*columns(second))
    kept = [(-value, position + 1) for value, position, counts in first + second if counts]
    assert tally.total.targets == len(kept)
    assert np.isclose(tally.total.loss, sum(loss for loss, _ in kept))
    assert tally.beyond.targets == sum(context > border for _, context in kept)
    assert np.isclose(tally.beyond.loss, sum(loss for loss, context in kept if context > border))
    by_context = dict(tally.by_context())
    for most, sums in by_context.items():
        inside = [loss for loss, context in kept if most // 2 < context <= most]
        assert sums.targets == len(inside) > 0 and np.isclose(sums.loss, sum(inside))
    assert sum(sums.targets for sums in by_context.values()) == len(kept)


@given(ROWS, ROWS)
def test_vectors_add_up(first, second):
    whole, parts = Tally(7), [Tally(7), Tally(7)]
    for tally, rows in zip(parts, (first, second), strict=True):
        tally.add(*columns(rows))
        whole.add(*columns(rows))
    summed = Tally(7).load(parts[0].vector() + parts[1].vector())
    assert np.allclose(summed.vector(), whole.vector()) and summed.total.targets == whole.total.targets


def test_nothing_has_no_mean():
    assert Tally().total.mean is None and Tally().by_context() == []


def test_powers_of_two_end_a_bucket():
    tally = Tally()
    tally.add(np.full(5, -1.0), np.array([0, 1, 2, 3, 4]), np.ones(5, dtype=bool))
    assert [(most, sums.targets) for most, sums in tally.by_context()] == [(1, 1), (2, 1), (4, 2), (8, 1)]
