"""Both bounds against the true optimum of hundreds of tiny batches, and what they say where they cannot hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.sequence.bound import class_milp_bound, staircase_bound, tightened_by
from efflaunch.parallel.sequence.class_lp import Effort
from efflaunch.parallel.sequence.cost import DegreeCost
from efflaunch.parallel.sequence.solve import solve_adaptive, solve_best_static, solve_greedy
from efflaunch.parallel.sequence.tables import Batch
from efflaunch.tests.parallel.sequence.tiny import cost_of, optimum, random_cost, random_lengths

ROUNDING = 1 + 1e-9


@pytest.mark.parametrize("monotone", [True, False])
@pytest.mark.parametrize("block", range(8))
def test_no_bound_exceeds_the_optimum_and_no_plan_is_below_it(block: int, monotone: bool) -> None:
    generator = np.random.default_rng([block, monotone])
    for _ in range(25):
        cost = random_cost(generator, monotone=monotone)
        lengths = random_lengths(generator, cost)
        best = optimum(lengths, cost)
        staircase = staircase_bound(lengths, cost)
        assert staircase.valid
        assert staircase.value_s <= best * ROUNDING, (lengths, cost)
        for solve in (solve_adaptive, solve_greedy, solve_best_static):
            plan = solve(lengths, cost)
            assert plan.predicted_s >= best / ROUNDING, (lengths, cost)
            assert plan.lower_bound_s is None or plan.lower_bound_s <= best * ROUNDING, (lengths, cost)
        batch = Batch(lengths, cost)
        for upper in (best, 1.05 * best, 1.5 * best):
            assert tightened_by(batch, staircase, upper).value_s <= best * ROUNDING, (lengths, cost, upper)


@pytest.mark.parametrize("monotone", [True, False])
@pytest.mark.parametrize("block", range(6))
def test_the_class_programs_bound_never_exceeds_the_optimum(block: int, monotone: bool) -> None:
    generator = np.random.default_rng([100 + block, monotone])
    for number in range(20):
        cost = random_cost(generator, monotone=monotone)
        lengths = random_lengths(generator, cost)
        best = optimum(lengths, cost)
        # With the optimum itself as the known plan the program is as tight as it gets; with a loose one classes are wider.
        upper = best if number % 2 else best * 1.3
        effort = Effort(alone=number % 4, bucket_ratio=1.3, class_ratio=1.25, cuts=3)
        for integer in (True, False):
            bound = class_milp_bound(lengths, cost, plan_s=upper, time_limit_s=5.0, effort=effort, integer=integer)
            assert bound.valid
            assert bound.value_s <= best * ROUNDING, (lengths, cost, bound)
            assert bound.value_s >= staircase_bound(lengths, cost).value_s


def test_the_bounds_are_close_on_tiny_batches() -> None:
    generator = np.random.default_rng(3)
    shares = []
    for _ in range(40):
        cost = random_cost(generator, monotone=True)
        lengths = random_lengths(generator, cost)
        best = optimum(lengths, cost)
        shares.append((staircase_bound(lengths, cost).value_s / best, solve_adaptive(lengths, cost).predicted_s / best))
    bound, plan = np.mean(shares, axis=0)
    assert bound > 0.85
    assert plan < 1.02


def test_a_cost_that_is_not_monotone_is_noted() -> None:
    cost = cost_of(4)
    faster = replace(cost.degrees[-1], attention_s=1e-9, linear_s=1e-5, exchange_s=0.0)
    odd = replace(cost, degrees=(*cost.degrees[:-1], faster))
    assert cost.is_monotone()
    assert not odd.is_monotone()
    bound = staircase_bound([100, 900], odd)
    assert bound.valid
    assert "not monotone" in bound.reason
    assert bound.value_s <= optimum([100, 900], odd) * ROUNDING


@pytest.mark.parametrize("linear_s", [-1e-2, 0.0, float("nan")])
def test_times_that_make_no_sense_make_no_bound(linear_s: float) -> None:
    cost = cost_of(2)
    broken = replace(cost, degrees=tuple(replace(part, linear_s=linear_s, attention_s=0.0, exchange_s=0.0) for part in cost.degrees))
    for bound in (staircase_bound([10, 20], broken), class_milp_bound([10, 20], broken, plan_s=1.0)):
        assert not bound.valid
        assert bound.reason
        assert bound.value_s == 0.0


def test_a_plan_of_a_broken_model_carries_no_bound() -> None:
    cost = cost_of(2)
    broken = replace(cost, degrees=tuple(replace(part, linear_s=0.0, attention_s=0.0, exchange_s=0.0) for part in cost.degrees))
    plan = solve_adaptive([10, 20], broken)
    assert plan.lower_bound_s is None
    assert plan.gap is None


def test_one_sequence_alone_is_bounded_exactly() -> None:
    cost = cost_of(8, step_s=0.25)
    fastest = min(cost.group_s([900], part.degree) for part in cost.degrees)
    assert staircase_bound([900], cost).value_s == pytest.approx(0.25 + cost.beta_s + fastest)
    assert solve_adaptive([900], cost).gap == pytest.approx(0.0, abs=1e-9)


def test_bounds_refuse_what_no_plan_holds() -> None:
    with pytest.raises(PlanError, match="sequence 1 with 9000 tokens"):
        staircase_bound([10, 9000], cost_of(4))


def test_windows_ring_and_beta_enter_the_closed_form() -> None:
    part = DegreeCost(degree=1, ulysses=1, attention_s=2e-6, linear_s=1e-3, ring_s=5e-3, windowed_s=((100, 1e-6),))
    assert part.sequence_s(50) == pytest.approx(50 * 1e-3 + 50 * 5e-3)
    pairs = 100 * (10_000 - 50)
    assert part.sequence_s(10_000) == pytest.approx(10.0 + 2e-6 * 1e8 + 1e-6 * pairs)
