"""When to save and how to copy: pure decisions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflaunch.checkpoint.interval import daly_s, solve_interval
from efflaunch.checkpoint.throttle import Pace, Throttle, next_pace


def _lost_share(interval_s: float, cost_s: float, failure_s: float) -> float:
    """Daly's model of the run time over the useful time, without the constant of a restart (2006, eq. 20)."""
    return failure_s * (math.exp((interval_s + cost_s) / failure_s) - 1) / interval_s


@given(cost=st.floats(1e-3, 100), failure=st.floats(1e3, 1e6))
def test_the_interval_is_close_to_the_best_one(cost: float, failure: float) -> None:
    chosen = daly_s(cost, failure)
    best = min(_lost_share(chosen * factor, cost, failure) for factor in (0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0))
    assert _lost_share(chosen, cost, failure) <= best * (1 + 1e-3)


def test_a_save_that_costs_more_than_failures_do() -> None:
    assert daly_s(300.0, 100.0) == 100.0


def test_storage_decides_where_it_is_slower() -> None:
    fast = solve_interval(stall_s=0.01, durable_s=1.0, step_s=2.0, mean_time_to_failure_s=86400)
    assert fast.steps == math.ceil(daly_s(0.01, 86400) / 2) and "lose least" in str(fast)
    slow = solve_interval(stall_s=0.01, durable_s=600.0, step_s=2.0, mean_time_to_failure_s=86400)
    assert slow.steps == 330 and "which decides" in str(slow) and "a checkpoint every 330 steps" in str(slow)


@pytest.mark.parametrize(
    ("pace", "with_s", "copy_s", "expected"),
    [
        (Pace.LAZY, 1.01, 0.3, Pace.LAZY),
        (Pace.LAZY, 1.10, 0.3, Pace.SPREAD),
        (Pace.LAZY, 3.00, 0.9, Pace.EAGER),
        (Pace.LAZY, 1.50, 0.9, Pace.LAZY),
        (Pace.SPREAD, 1.01, 0.3, Pace.SPREAD),
        (Pace.SPREAD, 1.10, 0.3, Pace.SPREAD),
        (Pace.SPREAD, 1.50, 0.3, Pace.EAGER),
    ],
)
def test_paces(pace: Pace, with_s: float, copy_s: float, expected: Pace) -> None:
    assert next_pace(pace, without_s=1.0, with_s=with_s, copy_s=copy_s, max_slowdown=0.02) is expected


def test_the_throttle_waits_for_enough_steps_and_says_why() -> None:
    throttle = Throttle(0.02)
    for _ in range(4):
        assert not throttle.add(1.0, None) and not throttle.add(1.2, 0.4)
    assert throttle.pace is Pace.LAZY and throttle.delay_s(0.4, 10) == 0.0
    assert not throttle.add(1.0, None)
    assert throttle.add(1.2, 0.4) and throttle.pace is Pace.SPREAD
    assert "20.0% longer: spread copies" in throttle.reason
    assert throttle.delay_s(0.4, 10) == pytest.approx(0.04)
