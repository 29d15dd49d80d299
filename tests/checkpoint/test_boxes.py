"""Runs of a tensor's numbers as boxes: every number once, in order, in as few boxes as their shape allows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.checkpoint.boxes import Box, boxes


@st.composite
def runs(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    begin = draw(st.integers(0, math.prod(shape)))
    return shape, begin, draw(st.integers(begin, math.prod(shape)))


@settings(max_examples=400, deadline=None)
@given(run=runs())
def test_boxes_hold_every_number_of_a_run_once_and_in_order(run) -> None:
    shape, begin, end = run
    numbers, got = np.arange(math.prod(shape)).reshape(shape), np.full(math.prod(shape), -1).reshape(shape)
    found, done = boxes(shape, begin, end), 0
    for box in found:
        assert box.first == done, "a box starts where the one before ends"
        inside = tuple(slice(at, at + size) for at, size in zip(box.offsets, box.shape, strict=True))
        got[inside] = np.arange(begin, end)[box.first : box.first + box.size].reshape(box.shape)
        done += box.size
    assert np.array_equal(got, np.where((numbers >= begin) & (numbers < end), numbers, -1))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_a_run_of_a_matrix_is_the_end_of_a_row_whole_rows_and_the_start_of_one() -> None:
    assert boxes((5, 4), 3, 14) == (Box((0, 3), (1, 1), 0), Box((1, 0), (2, 4), 1), Box((3, 0), (1, 2), 9))


@pytest.mark.parametrize(("shape", "begin", "end"), [((3,), 0, 4), ((3,), -1, 2), ((2, 2), 3, 2)])
def test_a_run_outside_the_tensor_is_refused(shape, begin, end) -> None:
    with pytest.raises(ValueError, match="numbers"):
        boxes(shape, begin, end)
