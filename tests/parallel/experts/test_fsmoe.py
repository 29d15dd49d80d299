"""FSMoE's formulas against the simulation of its own order, its degrees, and gradients that its windows hold."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflaunch.parallel.experts import fsmoe
from efflaunch.parallel.experts.cost import IDEAL, LayerCost, WeightGradients
from efflaunch.parallel.experts.plan import CHAIN, Phase
from efflaunch.parallel.experts.recipe import AFTER_DISPATCH, Piece, Prepared, Recipe, attempt, prepare
from efflaunch.parallel.experts.testbeds import TESTBEDS


def mixture_alone(cost: LayerCost) -> Prepared:
    """One layer's dispatch to combine, and nothing else."""
    forward = tuple(row for row in cost.forward if row.operator in CHAIN)
    backward = {how: tuple(row for row in rows if row.operator in CHAIN) for how, rows in cost.backward.items()}
    return prepare(replace(cost, forward=forward, backward=backward), IDEAL, 1)


def sampled(number: int) -> list[tuple[str, LayerCost]]:
    return [(name, bed.cost(layer)) for name, bed in TESTBEDS.items() for layer in random.Random(1).sample(list(bed.sweep()), number)]


@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.value)
def test_the_formulas_are_the_simulation(phase: Phase) -> None:
    """Within 0.3 %, for every degree, without a reduction and with small and large ones between dispatches and combines."""
    worst = 0.0
    for _, cost in sampled(40):
        prepared = mixture_alone(cost)
        assert prepared.gradient is not None
        for degree in fsmoe.DEGREES:
            for layers_of_gradient in (0, 0.25, 1, 4) if phase is Phase.BACKWARD else (0,):
                elements = round(layers_of_gradient * prepared.gradient.elements)
                pieces = (Piece(elements, 0, -1, 0, AFTER_DISPATCH),) if elements else ()
                seconds = attempt(Recipe(degree=degree, pieces=pieces), phase, prepared).seconds
                formula = fsmoe.mixture_s(fsmoe.chunk(phase, prepared, degree), prepared.gradient.seconds(elements))
                worst = max(worst, abs(formula / seconds - 1))
    assert worst < 0.003


def test_the_cases_by_hand() -> None:
    inter = fsmoe.Chunk(2, exchange_s=5.0, gather_s=1.0, scatter_s=1.0, experts_s=1.0)
    assert fsmoe.mixture_s(inter, 0.0) == 2 * 2 * 5 + 2 and fsmoe.window_s(inter) == 2
    assert fsmoe.mixture_s(inter, 10.0) == 20 + 10  # case 1
    experts = fsmoe.Chunk(2, exchange_s=1.0, gather_s=1.0, scatter_s=1.0, experts_s=9.0)
    assert fsmoe.mixture_s(experts, 0.0) == 2 + 2 + 18 and fsmoe.window_s(experts) == 18
    inside = fsmoe.Chunk(2, exchange_s=1.0, gather_s=4.0, scatter_s=4.0, experts_s=1.0)
    assert fsmoe.mixture_s(inside, 0.0) == 2 + 16 and fsmoe.window_s(inside) == 14


def test_its_degree_is_the_best_of_its_order() -> None:
    for _, cost in sampled(15):
        prepared = mixture_alone(cost)
        for phase in Phase:
            times = {degree: attempt(Recipe(degree=degree), phase, prepared).seconds for degree in fsmoe.DEGREES}
            assert times[fsmoe.choose_degree(phase, prepared)] <= min(times.values()) * 1.003


def test_degrees_of_forward_and_backward_differ_in_many_layers() -> None:
    """The paper counts 912 of its 1,458."""
    differ = 0
    for _, cost in sampled(100):
        prepared = prepare(cost, IDEAL, 1)
        differ += fsmoe.choose_degree(Phase.FORWARD, prepared) != fsmoe.choose_degree(Phase.BACKWARD, prepared)
    assert 40 < differ < 160


@given(
    layers=st.integers(1, 6),
    elements=st.integers(1, 1000),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_windows_hold_every_gradient_once_and_none_before_it_is_there(layers: int, elements: int, shares: tuple[float, float]) -> None:
    at = 0
    for piece in fsmoe.windows(layers, elements, shares[0] * elements, shares[1] * elements):
        assert piece.elements > 0 and (piece.low, piece.high) == (at // elements, (at + piece.elements - 1) // elements)
        assert piece.high < piece.place
        at += piece.elements
    assert at == layers * elements


def test_every_recipe_of_backward_reduces_all_of_it() -> None:
    for _, cost in sampled(5):
        prepared = prepare(cost, IDEAL, 4)
        recipes = list(fsmoe.backward(prepared))
        assert len(recipes) == 16 and prepared.gradient is not None
        for recipe in recipes:
            assert sum(piece.elements for piece in recipe.pieces) == 4 * prepared.gradient.elements


def test_without_a_gradient_to_reduce_there_is_one_recipe() -> None:
    (_, cost), *_ = sampled(1)
    (recipe,) = fsmoe.backward(prepare(replace(cost, gradient=None), IDEAL, 4))
    assert not recipe.pieces and recipe.weights is WeightGradients.FUSED
