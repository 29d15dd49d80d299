"""Divisors, for settings that must divide a number of ranks or heads. Pure."""

from __future__ import annotations

import math


def divisors(number: int) -> list[int]:
    """The divisors of a positive `number`, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def nearest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of a positive `number` up to `at_most`; 1 where that is less."""
    return max(n for n in divisors(number) if n <= max(1, at_most))


def common_powers_of_two(*numbers: int) -> list[int]:
    """The powers of two that divide all of the positive `numbers`, ascending."""
    shared = math.gcd(*numbers)
    return [1 << i for i in range((shared & -shared).bit_length())]
