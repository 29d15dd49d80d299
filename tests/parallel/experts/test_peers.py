"""What other systems can choose: pieces that hold every gradient, streams as their papers describe them."""

from __future__ import annotations

import pytest

from efflaunch.parallel.experts import peers
from efflaunch.parallel.experts.cost import IDEAL, ExpertLayer
from efflaunch.parallel.experts.plan import Phase, Streams
from efflaunch.parallel.experts.recipe import Prepared, Recipe, attempt, prepare
from efflaunch.parallel.experts.testbeds import TESTBEDS


@pytest.fixture
def prepared() -> Prepared:
    return prepare(TESTBEDS["A"].cost(ExpertLayer(batch=4, tokens=512, hidden=1024, ffn=4096, heads=8, capacity=1.2)), IDEAL, 3)


def test_pieces_hold_every_gradient_of_their_layer(prepared: Prepared) -> None:
    assert prepared.gradient is not None
    for pieces in (
        peers.at_end(prepared),
        peers.beside_attention(prepared),
        *(peers.in_pieces(prepared, size) for size in (10_000, 10**9)),
    ):
        for place in range(3):
            assert sum(piece.elements for piece in pieces if piece.low == piece.high == place) == prepared.gradient.elements
    sizes = {piece.elements for piece in peers.in_pieces(prepared, 10_000)}
    assert max(sizes) - min(sizes) <= 1 and 9_500 < min(sizes) < 10_500


def test_streams(prepared: Prepared) -> None:
    assert peers.sequential().streams is Streams.ONE and peers.lina(2).streams is Streams.TWO
    assert {recipe.streams for recipe in peers.tutel(4)} == {Streams.TWO}
    assert {(recipe.parts, recipe.degree) for recipe in peers.flowmoe(2)} == {(2, 1), (2, 2), (2, 4)}


def test_sequential_is_the_sum_of_its_parts(prepared: Prepared) -> None:
    assert prepared.gradient is not None
    bare = attempt(peers.sequential(), Phase.BACKWARD, prepared).seconds
    whole = attempt(peers.sequential(peers.at_end(prepared)), Phase.BACKWARD, prepared).seconds
    assert whole == pytest.approx(bare + 3 * prepared.gradient.seconds(prepared.gradient.elements), rel=1e-9)
    assert bare == pytest.approx(attempt(Recipe(), Phase.BACKWARD, prepared).seconds, rel=1e-9)


@pytest.mark.parametrize(("batch", "parts"), [(1, (1,)), (2, (1, 2)), (3, (1,)), (4, (1, 2, 4)), (6, (1, 2))])
def test_parts_divide_the_batch(batch: int, parts: tuple[int, ...]) -> None:
    assert peers.parts_of(batch) == parts
