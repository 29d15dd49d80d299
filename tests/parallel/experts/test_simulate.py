"""Plans replayed in time: equal to the planner's own time, under other costs, and refused where they cannot end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.experts.cost import CALIBRATED, IDEAL, ExpertLayer, LayerCost, Operator, Resource
from efflaunch.parallel.experts.plan import ExpertSchedule
from efflaunch.parallel.experts.recipe import prepare
from efflaunch.parallel.experts.simulate import simulate, simulate_schedule
from efflaunch.parallel.experts.solve import candidates, schedule, solve
from efflaunch.parallel.experts.testbeds import TESTBEDS

COST = TESTBEDS["A"].cost(ExpertLayer(batch=2, tokens=1024, hidden=2048, ffn=8192, heads=16, capacity=1.2))


@pytest.fixture(scope="module")
def plan() -> ExpertSchedule:
    return solve(COST, CALIBRATED)


def test_every_schedulers_plan_takes_what_it_was_predicted() -> None:
    for contention in (IDEAL, CALIBRATED):
        prepared = prepare(COST, contention, 4)
        for choice in candidates(prepared).values():
            made = schedule(choice, prepared)
            assert sum(line.seconds for line in simulate_schedule(made, COST, contention)) == pytest.approx(made.predicted_s, rel=1e-6)


def test_a_resource_runs_one_task_at_a_time_in_the_plans_order(plan: ExpertSchedule) -> None:
    for line in simulate_schedule(plan, COST, CALIBRATED):
        for order in line.plan.orders:
            bars = [line.bars[number] for number in order]
            assert all(one.stop_s <= other.start_s + 1e-12 for one, other in zip(bars, bars[1:], strict=False))
        for resource in Resource:
            spent = sum(bar.stop_s - bar.start_s for bar in line.bars if bar.task.resource is resource)
            assert 0 < line.busy_share(resource) <= 1 and line.busy_share(resource) == pytest.approx(spent / line.seconds)


def test_the_same_plan_on_a_slower_machine(plan: ExpertSchedule) -> None:
    def slower(cost: LayerCost) -> LayerCost:
        backward = {
            how: tuple(replace(row, alpha_s=2 * row.alpha_s, work_s=2 * row.work_s) for row in rows) for how, rows in cost.backward.items()
        }
        assert cost.gradient is not None
        gradient = replace(cost.gradient, alpha_s=2 * cost.gradient.alpha_s, element_s=2 * cost.gradient.element_s)
        return replace(cost, backward=backward, gradient=gradient)

    once, twice = simulate(plan.backward, COST, CALIBRATED), simulate(plan.backward, slower(COST), CALIBRATED)
    assert twice.seconds == pytest.approx(2 * once.seconds, rel=1e-9)
    assert simulate(plan.backward, COST, IDEAL).seconds < once.seconds


def test_orders_that_cannot_end(plan: ExpertSchedule) -> None:
    orders = (tuple(reversed(plan.forward.orders[0])), *plan.forward.orders[1:])
    with pytest.raises(PlanError, match="wait for each other for ever"):
        simulate(replace(plan.forward, orders=orders), COST, CALIBRATED)


def test_costs_of_another_layout(plan: ExpertSchedule) -> None:
    without = tuple(row for row in COST.forward if row.operator is not Operator.EXPERT_GATHER)
    with pytest.raises(PlanError, match="no EXPERT_GATHER on INTRA"):
        simulate(plan.forward, replace(COST, forward=without), CALIBRATED)
