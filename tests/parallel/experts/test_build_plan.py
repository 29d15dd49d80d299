"""Any recipe becomes a plan that can be executed, holds every gradient once, and takes in simulation what the attempt took."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.parallel.experts import fsmoe, peers
from efflaunch.parallel.experts.build_plan import phase_plan
from efflaunch.parallel.experts.cost import (
    CALIBRATED,
    IDEAL,
    AlphaBeta,
    Collective,
    ExpertLayer,
    Groups,
    LayerCost,
    ProcessGroup,
    Resource,
    WeightGradients,
    layer_cost,
)
from efflaunch.parallel.experts.plan import Phase, Streams, check_phase
from efflaunch.parallel.experts.recipe import Order, Piece, Prepared, Recipe, attempt, prepare
from efflaunch.parallel.experts.simulate import simulate
from efflaunch.parallel.experts.testbeds import TESTBEDS


def costs() -> st.SearchStrategy[LayerCost]:
    """Layers of both testbeds, of a cluster whose experts span both kinds of links, and of a single node."""
    layers = st.builds(
        ExpertLayer,
        batch=st.sampled_from([2, 4]),
        tokens=st.sampled_from([256, 1024]),
        hidden=st.sampled_from([1024, 4096]),
        ffn=st.sampled_from([2048, 8192]),
        heads=st.just(16),
        capacity=st.floats(1.0, 2.4),
    )
    return st.builds(lambda layer, kind: LAYOUTS[kind](layer), layers, st.sampled_from(list(LAYOUTS)))


def both_links(layer: ExpertLayer) -> LayerCost:
    """Experts over all ranks of testbed B: each all-to-all is two tasks, and nothing gathers experts."""
    testbed = TESTBEDS["B"]
    collectives = {**testbed.rates.collectives, (Collective.ALL_TO_ALL, Resource.INTRA): AlphaBeta(3e-5, 2e-10)}
    groups = replace(testbed.groups, experts=ProcessGroup(32, 4), shards=ProcessGroup(1, 1))
    return layer_cost(layer, groups, replace(testbed.rates, collectives=collectives))


def one_node(layer: ExpertLayer) -> LayerCost:
    """Experts and gradients over the ranks of one node: nothing uses the links between nodes."""
    testbed, node = TESTBEDS["A"], ProcessGroup(8, 8)
    more = {(kind, Resource.INTRA): AlphaBeta(2e-4, 5e-11) for kind in (Collective.ALL_TO_ALL, Collective.ALL_REDUCE)}
    groups = Groups(experts=node, shards=ProcessGroup(1, 1), attention=node, gradients=node)
    return layer_cost(layer, groups, replace(testbed.rates, collectives={**testbed.rates.collectives, **more}))


LAYOUTS = {"A": TESTBEDS["A"].cost, "B": TESTBEDS["B"].cost, "both": both_links, "node": one_node}


@st.composite
def backward_recipes(draw: st.DrawFn, prepared: Prepared) -> Recipe:
    gradient = prepared.gradient
    assert gradient is not None
    shares = draw(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)))
    order = draw(st.sampled_from(Order))
    reductions: list[tuple[Piece, ...] | None] = [
        peers.at_end(prepared),
        peers.beside_attention(prepared),
        fsmoe.windows(prepared.layers, gradient.elements, shares[0] * gradient.elements, shares[1] * gradient.elements),
        None,
    ]
    # Small pieces have no place in a strict order: they give way.
    pieces = draw(st.sampled_from(reductions if order.is_strict else [*reductions, peers.in_pieces(prepared, 2**18)]))
    return Recipe(
        degree=draw(st.sampled_from([1, 2, 3, 5])),
        parts=1 if order.is_strict else draw(st.sampled_from([1, 2])),
        weights=draw(st.sampled_from(WeightGradients)),
        horizon=draw(st.sampled_from([1, 2])),
        stagger=draw(st.sampled_from([0.0, 0.5])),
        streams=draw(st.sampled_from(Streams)) if pieces is not None else Streams.THREE,
        order=order,
        pieces=pieces or (),
        gap_stretch=None if pieces is not None else draw(st.floats(0.5, 2.0)),
    )


@given(cost=costs(), layers=st.integers(1, 4), contention=st.sampled_from([IDEAL, CALIBRATED]), data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_backward_plan_is_whole_and_takes_what_the_attempt_took(
    cost: LayerCost, layers: int, contention: object, data: st.DataObject
) -> None:
    prepared = prepare(cost, contention, layers)  # type: ignore[arg-type]
    recipe = data.draw(backward_recipes(prepared))
    tried = attempt(recipe, Phase.BACKWARD, prepared)
    plan = phase_plan(tried, Phase.BACKWARD, prepared)
    check_phase(plan)
    assert cost.gradient is not None
    assert sum(task.elements for task in plan.pieces) == layers * cost.gradient.elements
    line = simulate(plan, cost, prepared.contention)
    assert line.seconds == pytest.approx(tried.seconds, rel=1e-6)
    stops = [bar.stop_s for bar in line.bars]
    for bar in line.bars:
        assert all(stops[need] <= bar.start_s + 1e-12 for need in bar.task.needs)


@given(
    cost=costs(),
    degree=st.sampled_from([1, 2, 3, 12]),
    parts=st.sampled_from([1, 2]),
    order=st.sampled_from([Order.RANK, Order.ARRIVAL]),
    contention=st.sampled_from([IDEAL, CALIBRATED]),
)
@settings(max_examples=40, deadline=None)
def test_a_forward_plan_takes_what_the_attempt_took(cost: LayerCost, degree: int, parts: int, order: Order, contention: object) -> None:
    prepared = prepare(cost, contention, 2)  # type: ignore[arg-type]
    tried = attempt(Recipe(degree=degree, parts=parts, order=order), Phase.FORWARD, prepared)
    plan = phase_plan(tried, Phase.FORWARD, prepared)
    check_phase(plan)
    assert plan.gradient_elements == 0 and not plan.pieces
    assert simulate(plan, cost, prepared.contention).seconds == pytest.approx(tried.seconds, rel=1e-9)
    assert [task.layer for task in plan.tasks] == sorted(task.layer for task in plan.tasks)


def test_layers_of_backward_count_down() -> None:
    prepared = prepare(TESTBEDS["A"].cost(ExpertLayer(batch=1, tokens=512, hidden=1024, ffn=2048, heads=8, capacity=1.2)), IDEAL, 3)
    plan = phase_plan(attempt(Recipe(pieces=peers.at_end(prepared)), Phase.BACKWARD, prepared), Phase.BACKWARD, prepared)
    assert [task.layer for task in plan.pieces] == [2, 1, 0]
    assert plan.tasks[0].layer == 2 and plan.tasks[plan.orders[0][-1]].layer == 0
