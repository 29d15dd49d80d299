"""One attempt at a phase: a plain chain adds up, contention and streams matter as they should, reductions are all there."""

from __future__ import annotations

from typing import Any

import pytest

from efflaunch.parallel.experts.cost import CALIBRATED, IDEAL, ExpertLayer, LayerCost, WeightGradients
from efflaunch.parallel.experts.engine import PIECE_ELEMENTS
from efflaunch.parallel.experts.plan import Phase, Streams
from efflaunch.parallel.experts.recipe import Order, Piece, Recipe, attempt, prepare
from efflaunch.parallel.experts.testbeds import TESTBEDS

LAYER = ExpertLayer(batch=2, tokens=512, hidden=1024, ffn=4096, heads=16, capacity=1.2)


def cost(testbed: str = "B") -> LayerCost:
    return TESTBEDS[testbed].cost(LAYER)


def seconds(phase: Phase, layers: int = 3, contention: Any = IDEAL, **words: Any) -> float:
    return attempt(Recipe(**words), phase, prepare(cost(), contention, layers)).seconds


def test_one_chunk_after_the_other_is_the_sum_of_all_tasks() -> None:
    for phase, rows in ((Phase.FORWARD, cost().forward), (Phase.BACKWARD, cost().backward[WeightGradients.FUSED])):
        alone = 3 * sum(row.seconds(1.0) for row in rows)
        assert seconds(phase) == pytest.approx(alone, rel=1e-9)
        # There is nothing to contend with, and a single stream changes nothing.
        assert seconds(phase, contention=CALIBRATED) == pytest.approx(alone, rel=1e-9)
        assert seconds(phase, streams=Streams.ONE) == pytest.approx(alone, rel=1e-9)


def test_on_one_stream_a_chunk_costs_its_alphas() -> None:
    rows = cost().forward
    chunked = [row for row in rows if 4 <= row.operator <= 8]
    more = 3 * sum(row.alpha_s for row in chunked)
    assert seconds(Phase.FORWARD, degree=2, streams=Streams.ONE) == pytest.approx(seconds(Phase.FORWARD) + more, rel=1e-9)


def test_more_streams_are_faster_and_contention_is_slower() -> None:
    two, three = (seconds(Phase.FORWARD, degree=2, streams=streams) for streams in (Streams.TWO, Streams.THREE))
    assert three < two < seconds(Phase.FORWARD, degree=2, streams=Streams.ONE)
    assert seconds(Phase.FORWARD, degree=2, contention=CALIBRATED) > three


def test_a_piece_behind_everything_adds_its_time() -> None:
    gradient = cost().gradient
    assert gradient is not None
    pieces = (Piece(3 * gradient.elements, 0, 2, 3),)
    whole = seconds(Phase.BACKWARD, pieces=pieces)
    # The last scatter runs beside it.
    scatter = next(row for row in cost().forward if row.operator.name == "ATTENTION_SCATTER").seconds(1.0)
    assert whole == pytest.approx(seconds(Phase.BACKWARD) - scatter + gradient.seconds(3 * gradient.elements), rel=1e-9)


@pytest.mark.parametrize("weights", WeightGradients, ids=lambda how: how.name)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_pool_sends_every_gradient_once(weights: WeightGradients, parts: int) -> None:
    prepared = prepare(cost("A"), CALIBRATED, 4)
    tried = attempt(Recipe(degree=3, parts=parts, weights=weights, order=Order.RANK, gap_stretch=1.02), Phase.BACKWARD, prepared)
    assert prepared.gradient is not None
    assert tried.sends[PIECE_ELEMENTS].sum() == pytest.approx(4 * prepared.gradient.elements, abs=1.0)


def test_orders_that_cannot_end_take_infinitely_long() -> None:
    """A piece of the last layer's gradient in front of the first dispatch."""
    assert seconds(Phase.BACKWARD, pieces=(Piece(5, 2, 2, 0, -1.0),)) == float("inf")
