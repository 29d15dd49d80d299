"""Divisors against their definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflaunch.utils.divisors import common_powers_of_two, divisors, nearest_divisor


@given(st.integers(1, 500))
def test_divisors_are_all_that_divide(number: int) -> None:
    assert divisors(number) == sorted({n for m in range(1, number + 1) if number % m == 0 for n in (m, number // m)})


@pytest.mark.parametrize(
    ("number", "at_most", "nearest"), [(12, 5, 4), (12, 4, 4), (12, 100, 12), (7, 6, 1), (8, 0, 1), (8, -3, 1), (1, 1, 1)]
)
def test_the_nearest_divisor_is_the_largest_that_is_small_enough(number: int, at_most: int, nearest: int) -> None:
    assert nearest_divisor(number, at_most) == nearest


@given(st.integers(1, 500), st.integers(1, 500))
def test_common_powers_of_two_divide_both(first: int, second: int) -> None:
    assert common_powers_of_two(first, second) == [p for p in (1 << i for i in range(10)) if first % p == 0 and second % p == 0]
    assert common_powers_of_two(first) == common_powers_of_two(first, 1 << 10)
