"""The turns a layer's experts are taken in: from plans of the solver, whole and in the order of their streams, and refused where not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.experts.build_plan import phase_plan
from efflaunch.parallel.experts.cost import CALIBRATED, Operator, WeightGradients
from efflaunch.parallel.experts.layer_order import PLAIN, LayerOrder, Move, PassOrder, Turn, check_pass, in_order, pass_order
from efflaunch.parallel.experts.plan import Phase, PhasePlan, Streams
from efflaunch.parallel.experts.recipe import Order, Recipe, attempt, prepare
from efflaunch.parallel.experts.testbeds import TESTBEDS
from efflaunch.tests.parallel.experts.test_plan import LAYER


def plan_of(phase: Phase, recipe: Recipe) -> PhasePlan:
    prepared = prepare(TESTBEDS["B"].cost(LAYER), CALIBRATED, 1)
    return phase_plan(attempt(recipe, phase, prepared), phase, prepared)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("streams", Streams)
def test_a_plan_becomes_turns_that_keep_the_order_of_its_streams(degree: int, streams: Streams) -> None:
    for phase, weights in ((Phase.FORWARD, WeightGradients.FUSED), (Phase.BACKWARD, WeightGradients.EXPERTS)):
        plan = plan_of(phase, Recipe(degree=degree, streams=streams, weights=weights, order=Order.RANK))
        order = pass_order(plan)
        assert order.degree == degree and order.defers_weights is (phase is Phase.BACKWARD)
        place = {turn: number for number, turn in enumerate(order.turns)}
        moves = {Operator.DISPATCH: Move.DISPATCH, Operator.EXPERTS: Move.EXPERTS, Operator.COMBINE: Move.COMBINE}
        for numbers in plan.orders:
            tasks = [plan.tasks[number] for number in numbers if plan.tasks[number].operator in moves]
            places = [place[Turn(moves[task.operator], task.chunk)] for task in tasks]
            assert places == sorted(places)


def test_streams_that_wait_for_each_other_are_refused() -> None:
    plan = plan_of(Phase.FORWARD, Recipe(degree=2))
    compute, *others = plan.orders
    with pytest.raises(PlanError, match="wait for each other"):
        pass_order(replace(plan, orders=(tuple(reversed(compute)), *others)))


def test_turns_in_order() -> None:
    turns = [f"{turn.move.value} {turn.chunk}" for turn in in_order(2, defers_weights=True).turns]
    assert turns == ["dispatch 0", "dispatch 1", "experts 0", "combine 0", "experts 1", "combine 1", "weights 0", "weights 1"]
    assert in_order(1).words == "1 chunk" and in_order(2, defers_weights=True).words == "2 chunks, weight gradients deferred"
    assert PLAIN.is_plain and not LayerOrder(in_order(1), in_order(1, defers_weights=True)).is_plain


@pytest.mark.parametrize(
    "turns",
    [
        in_order(2).turns[1:],
        (*in_order(2).turns, Turn(Move.COMBINE, 1)),
        tuple(reversed(in_order(2).turns)),
        (*in_order(2).turns, Turn(Move.WEIGHTS, 0)),
        (Turn(Move.WEIGHTS, 0), *in_order(2).turns, Turn(Move.WEIGHTS, 1)),
        in_order(1).turns,
    ],
)
def test_turns_that_cannot_be_taken_are_refused(turns: tuple[Turn, ...]) -> None:
    with pytest.raises(PlanError, match="2 chunks"):
        check_pass(PassOrder(2, turns))


def test_the_digest_is_of_what_is_executed() -> None:
    orders = [
        LayerOrder(in_order(forward), in_order(backward, defers_weights=defers))
        for forward in (1, 2)
        for backward in (1, 2)
        for defers in (False, True)
    ]
    assert len({order.digest for order in orders}) == 8 and orders[0].digest == PLAIN.digest


@pytest.mark.parametrize(("degrees", "experts", "slots"), [((1, 1), 4, 1), ((4, 2), 4, 1), ((4, 2), 1, 4), ((3, 2), 4, 3), ((4, 3), 2, 6)])
def test_chunks_of_both_passes_are_whole_slots(degrees: tuple[int, int], experts: int, slots: int) -> None:
    order = LayerOrder(*map(in_order, degrees))
    assert order.slots(experts) == slots
    assert all(experts * slots % degree == 0 for degree in degrees)
