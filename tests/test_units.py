"""Quantities as people read them."""

from __future__ import annotations

import pytest

from efflaunch.units import format_precise


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.00 s"), (8.5e-4, "850 us"), (0.0123, "12.3 ms"), (0.9994, "999 ms"), (0.9996, "1.00 s"), (1.234, "1.23 s"), (9.996, "10.0 s")]
    + [(21.44, "21.4 s"), (99.96, "100 s"), (184, "184 s"), (2500, "2,500 s"), (-0.5, "-500 ms")],
)
def test_three_digits(seconds: float, text: str) -> None:
    assert format_precise(seconds) == text
