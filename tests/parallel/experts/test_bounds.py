"""Lower bounds: by hand, under every schedule there is, and near the best of the plain ones."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflaunch.parallel.experts.bounds import bounds, links_s
from efflaunch.parallel.experts.cost import (
    CALIBRATED,
    IDEAL,
    Contention,
    ExpertLayer,
    GradientCost,
    LayerCost,
    Operator,
    OperatorCost,
    Resource,
    WeightGradients,
)
from efflaunch.parallel.experts.plan import Phase
from efflaunch.parallel.experts.recipe import Order, Recipe, attempt, prepare
from efflaunch.parallel.experts.solve import DEFERRED, DEGREES, candidates
from efflaunch.parallel.experts.testbeds import TESTBEDS

HARD = Contention("hard", ((0.0, 0.1, 0.1), (0.0, 0.0, 1.5), (0.0, 1.5, 0.0)))


def flat_cost(batch: int) -> LayerCost:
    """No alphas: attention 2 s, dispatch and combine 3 s each, experts 4 s forward; one gradient of 5 s."""
    links = [OperatorCost(kind, Resource.INTER, 0.0, 3.0) for kind in (Operator.DISPATCH, Operator.COMBINE)]
    forward = (
        *links,
        OperatorCost(Operator.EXPERTS, Resource.COMPUTE, 0.0, 4.0),
        OperatorCost(Operator.ATTENTION, Resource.COMPUTE, 0.0, 2.0),
    )
    backward = (
        *forward[:3],
        OperatorCost(Operator.EXPERT_WEIGHTS, Resource.COMPUTE, 0.0, 4.0),
        OperatorCost(Operator.ATTENTION, Resource.COMPUTE, 0.0, 4.0),
    )
    return LayerCost(forward, {how: backward for how in WeightGradients}, GradientCost(Resource.INTER, 1.0, 0.5, 8), batch)


def test_by_hand() -> None:
    found = bounds(flat_cost(1), IDEAL, 2)
    # Forward: compute 12 s, links 12 s; whole: twice 2 s of attention and 6 s of links, which no chunk can hide.
    # Backward: compute 24 s, links 12 + 1 + 8 s; whole: twice 4 + 6 s, and 5 s of the last layer's gradient.
    assert found.whole_s == pytest.approx(2 * (2 + 6 + 4 / 64) + 25, rel=1e-2)
    # Any part of a whole batch is the whole batch: attention and links again, and a gradient.
    assert found.any_s == pytest.approx(16 + 25)
    # Halves: the way of one is half as long, resources decide.
    assert bounds(flat_cost(2), IDEAL, 2).any_s == pytest.approx(12 + 24)


def test_links_by_hand() -> None:
    assert links_s(3.0, 1.0, IDEAL) == 3.0
    # 1.4 s together do one second of each, the other two alone.
    assert links_s(3.0, 1.0, CALIBRATED) == pytest.approx(3.4)
    assert links_s(3.0, 1.0, HARD) == 4.0


@given(intra=st.floats(0, 10), inter=st.floats(0, 10), extra=st.floats(0, 3), together=st.floats(0, 20))
def test_no_division_of_time_between_links_is_faster(intra: float, inter: float, extra: float, together: float) -> None:
    contention = Contention("any", ((0.0,) * 3, (0.0, 0.0, extra), (0.0, extra, 0.0)))
    alone = max(0.0, intra - together / (1 + extra)) + max(0.0, inter - together / (1 + extra))
    assert links_s(intra, inter, contention) <= together + alone + 1e-9


@pytest.mark.parametrize("contention", [IDEAL, CALIBRATED, HARD], ids=lambda contention: contention.name)
@pytest.mark.parametrize("name", TESTBEDS)
def test_no_schedule_is_under_a_bound_that_holds_for_it(name: str, contention: Contention) -> None:
    """All candidates, and list schedules of every degree, half-batches and deferral whether they are good or not."""
    for layer in random.Random(2).sample(list(TESTBEDS[name].sweep()), 8):
        cost = TESTBEDS[name].cost(layer)
        limit, prepared = bounds(cost, contention, 4), prepare(cost, contention, 4)
        for choice in candidates(prepared).values():
            assert choice.seconds >= limit.any_s * (1 - 1e-9)
            assert choice.parts > 1 or choice.seconds >= limit.whole_s * (1 - 1e-9)
        for parts in (1, 2) if layer.batch > 1 else (1,):
            forward = min(attempt(Recipe(degree=r, parts=parts, order=Order.RANK), Phase.FORWARD, prepared).seconds for r in DEGREES)
            backward = min(
                attempt(
                    Recipe(degree=degree, parts=parts, order=Order.RANK, weights=weights, horizon=horizon, gap_stretch=1.02),
                    Phase.BACKWARD,
                    prepared,
                ).seconds
                for degree in DEGREES
                for weights, horizon in DEFERRED
            )
            assert forward + backward >= (limit.whole_s if parts == 1 else limit.any_s) * (1 - 1e-9)


def test_the_bounds_are_not_far() -> None:
    """Without contention our whole-batch plans are within a tenth of their bound in the mean."""
    ratios = []
    for name, bed in TESTBEDS.items():
        for layer in random.Random(4).sample(list(bed.sweep()), 10):
            cost = TESTBEDS[name].cost(layer)
            ratios.append(candidates(prepare(cost, IDEAL, 4))["ours"].seconds / bounds(cost, IDEAL, 4).whole_s)
    assert 1.0 <= sum(ratios) / len(ratios) < 1.1


def test_a_layer_alone_on_one_rank_is_its_compute() -> None:
    layer = ExpertLayer(batch=1, tokens=512, hidden=1024, ffn=2048, heads=8, capacity=1.2)
    cost = TESTBEDS["A"].cost(layer)
    compute = tuple(row for row in cost.forward if row.resource is Resource.COMPUTE)
    backward = {how: tuple(row for row in rows if row.resource is Resource.COMPUTE) for how, rows in cost.backward.items()}
    alone = LayerCost(compute, backward, None, 1)
    spent = 3 * sum(row.seconds(1.0) for row in (*compute, *backward[WeightGradients.FUSED]))
    assert bounds(alone, CALIBRATED, 3).any_s == pytest.approx(spent)
    assert bounds(alone, CALIBRATED, 3).whole_s == pytest.approx(spent)
