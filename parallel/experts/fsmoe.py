"""FSMoE's own plan (arXiv 2501.10714): degrees by its four cases, gradients partitioned over its windows. Pure.

a, g, s, e are seconds of one chunk's dispatch, gather, scatter and experts. In its order every stream works operator by operator, the
all-to-all's stream: all dispatches, a piece of the gradient's reduction, all combines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .cost import GradientCost, Operator
from .plan import Phase, Streams
from .recipe import AFTER_DISPATCH, IN_ATTENTION, Order, Piece, Prepared, Recipe

DEGREES = (1, 2, 4, 8)
"""What its code rounds degrees to."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of a layer's gradient in a window, of which all pairs are tried."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Seconds of one of `degree` chunks."""

    degree: int
    exchange_s: float
    gather_s: float
    scatter_s: float
    experts_s: float


def chunk(phase: Phase, prepared: Prepared, degree: int) -> Chunk:
    """The chunk of a phase; operators a layout does not have take no time."""
    rows = prepared.operators(phase)
    seconds = {kind: sum(row.seconds(1 / degree) for row in rows if row.operator is kind) for kind in Operator}
    dispatch, experts = seconds[Operator.DISPATCH], seconds[Operator.EXPERTS]
    return Chunk(degree, dispatch, seconds[Operator.EXPERT_GATHER], seconds[Operator.EXPERT_SCATTER], experts)


def mixture_s(part: Chunk, reduce_s: float) -> float:
    """Seconds of a layer's dispatch to combine beside a reduction of `reduce_s`, by the paper's questions and cases."""
    r, a, inside = part.degree, part.exchange_s, part.gather_s + part.scatter_s
    experts = r * part.experts_s
    if a > part.gather_s:
        bound_s = 2 * a + inside + experts if experts > 2 * (r - 1) * a else 2 * r * a + inside
    else:
        bound_s = 2 * a + inside + experts if experts > (r - 1) * inside else 2 * a + r * inside
    # A reduction that does not fit beside the rest makes the links between nodes the limit: case 1.
    return bound_s if reduce_s <= bound_s - 2 * r * a else 2 * r * a + reduce_s


def window_s(part: Chunk) -> float:
    """Seconds of a reduction that the exchanges hide: nothing gets later by it."""
    return mixture_s(part, 0.0) - 2 * part.degree * part.exchange_s


def choose_degree(phase: Phase, prepared: Prepared, reduce_s: float = 0.0) -> int:
    """The degree whose case takes least; smaller ones win ties."""
    return min(DEGREES, key=lambda degree: mixture_s(chunk(phase, prepared, degree), reduce_s))


def forward(prepared: Prepared) -> Recipe:
    """Its forward pass."""
    return Recipe(degree=choose_degree(Phase.FORWARD, prepared))


def backward(prepared: Prepared) -> Iterator[Recipe]:
    """Its backward pass: gradients as the paper partitions them, and by a grid of shares, of which the paper's search can find the best."""
    gradient = prepared.gradient
    if gradient is None:
        yield Recipe(degree=choose_degree(Phase.BACKWARD, prepared))
        return
    yield _recipe(prepared, partition(prepared, gradient), gradient)
    for mixture in SHARES:
        for attention in SHARES:
            if mixture + attention <= 1.0:
                yield _recipe(prepared, (mixture * gradient.elements, attention * gradient.elements), gradient)


def one_stream(pieces: tuple[Piece, ...] = ()) -> Iterator[Recipe]:
    """Its plan without links of both kinds side by side: all communication on one stream."""
    for degree in DEGREES:
        for order in (Order.IN_ORDER, Order.INTERLEAVED):
            yield Recipe(degree=degree, streams=Streams.TWO, order=order, pieces=pieces)


def partition(prepared: Prepared, gradient: GradientCost) -> tuple[float, float]:
    """Elements of a layer in the mixture's window and in attention's: as much as fits first, the rest evenly over the mixtures.

    The paper's first step fills windows layer by layer, its second spreads the rest by a search; with equal layers, evenly is best.
    """
    part = chunk(Phase.BACKWARD, prepared, choose_degree(Phase.BACKWARD, prepared))
    rows = prepared.operators(Phase.BACKWARD)
    dense_s = sum(
        row.seconds(1.0) for row in rows if row.operator in (Operator.ATTENTION, Operator.ATTENTION_GATHER, Operator.ATTENTION_SCATTER)
    )
    mixture = min(gradient.elements, _fits(window_s(part), gradient))
    attention = min(gradient.elements - mixture, _fits(dense_s, gradient))
    return gradient.elements - attention, attention


def _fits(window: float, gradient: GradientCost) -> float:
    return max(0.0, (window - gradient.alpha_s) / gradient.element_s)


def _recipe(prepared: Prepared, elements: tuple[float, float], gradient: GradientCost) -> Recipe:
    """Each layer reduces in its windows what the layer before it left; the rest comes at the end."""
    pieces = windows(prepared.layers, gradient.elements, *elements)
    return Recipe(degree=choose_degree(Phase.BACKWARD, prepared, gradient.seconds(elements[0])), pieces=pieces)


def windows(layers: int, elements: int, mixture: float, attention: float) -> tuple[Piece, ...]:
    """Pieces of at most `mixture` and `attention` elements in the windows of each layer, first come, first reduced; all are in some."""
    pieces: list[Piece] = []
    sent = 0
    for place in range(1, layers):
        for room, slot in ((round(mixture), AFTER_DISPATCH), (round(attention), IN_ATTENTION)):
            size = min(room, place * elements - sent)
            if size > 0:
                pieces.append(_piece(sent, size, elements, place, slot))
                sent += size
    if sent < layers * elements:
        pieces.append(_piece(sent, layers * elements - sent, elements, layers, 0.0))
    return tuple(pieces)


def _piece(sent: int, size: int, elements: int, place: int, slot: float) -> Piece:
    return Piece(size, sent // elements, (sent + size - 1) // elements, place, slot)
