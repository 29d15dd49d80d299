"""Schedules of other systems, as recipes: what each can choose, of which the simulated best stands for it. Pure.

Each is given more than it has where the papers leave something open: the best of both orders of exchange and gather, the best size of
pieces by trying all, three streams where a paper is silent about links inside nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from .fsmoe import DEGREES
from .plan import Streams
from .recipe import IN_ATTENTION, Order, Piece, Prepared, Recipe

LINA_PIECE_ELEMENTS = 30 * 10**6 // 4
"""30 MB of float32."""
FLOWMOE_PIECES = (2**18, 2**19, 2**20, 2**21, 2**22, 2**23)
"""Elements of a piece: 1 to 32 MiB of float32."""
STREAM_ORDERS = (Order.INTERLEAVED, Order.IN_ORDER)


class Peer(Enum):
    """Schedulers that ours is compared with."""

    SEQUENTIAL = "sequential"
    """One task after the other, as DeepSpeed-MoE (arXiv 2201.05596)."""
    TUTEL = "tutel"
    """Chunks of the best degree, one stream for all communication, gradients after the backward pass (arXiv 2206.03382)."""
    TUTEL_OVERLAP = "tutel_overlap"
    """The same with each layer's gradient reduced beside the next layer's attention: FSMoE's "Tutel-Improved"."""
    LINA = "lina"
    """Tutel's chunks, and gradients in pieces of 30 MB that give way to all-to-alls (arXiv 2210.17223)."""
    FSMOE_ONE_STREAM = "fsmoe_one_stream"
    """FSMoE's gradients without both kinds of links side by side."""
    FSMOE = "fsmoe"
    """arXiv 2501.10714: see fsmoe.py."""
    FLOWMOE = "flowmoe"
    """Attention in parts too, first come, first served; pieces of the gradient of the best size give way (arXiv 2510.00207)."""


def at_end(prepared: Prepared) -> tuple[Piece, ...]:
    """Every layer's gradient whole, one after the other when the pass is over."""
    return _whole(prepared, [(prepared.layers + place, 0.0) for place in range(prepared.layers)])


def beside_attention(prepared: Prepared) -> tuple[Piece, ...]:
    """Every layer's gradient whole, beside the next layer's attention."""
    return _whole(prepared, [(place + 1, IN_ATTENTION) for place in range(prepared.layers)])


def in_pieces(prepared: Prepared, elements: int) -> tuple[Piece, ...]:
    """Every layer's gradient in equal pieces of about so many elements."""
    gradient = prepared.gradient
    if gradient is None:
        return ()
    count = max(1, round(gradient.elements / elements))
    sizes = [gradient.elements * (k + 1) // count - gradient.elements * k // count for k in range(count)]
    return tuple(Piece(size, place, place, place) for place in range(prepared.layers) for size in sizes)


def sequential(pieces: tuple[Piece, ...] = ()) -> Recipe:
    """Everything on one stream."""
    return Recipe(streams=Streams.ONE, pieces=pieces)


def lina(degree: int, pieces: tuple[Piece, ...] = ()) -> Recipe:
    """One stream for all communication, on which pieces give way to everything else."""
    return Recipe(degree=degree, streams=Streams.TWO, order=Order.RANK, pieces=pieces)


def tutel(degree: int, pieces: tuple[Piece, ...] = ()) -> Iterator[Recipe]:
    """One stream for all communication, in both orders."""
    for order in STREAM_ORDERS:
        yield Recipe(degree=degree, streams=Streams.TWO, order=order, pieces=pieces)


def flowmoe(parts: int, pieces: tuple[Piece, ...] = ()) -> Iterator[Recipe]:
    """So many parts of the batch, chunks within them, first come, first served."""
    for degree in DEGREES:
        if parts * degree <= DEGREES[-1]:
            yield Recipe(degree=degree, parts=parts, order=Order.ARRIVAL, pieces=pieces)


def parts_of(batch: int) -> tuple[int, ...]:
    """Parts a batch can be cut into equally, at most 4."""
    return tuple(parts for parts in (1, 2, 4) if batch % parts == 0)


def _whole(prepared: Prepared, slots: list[tuple[int, float]]) -> tuple[Piece, ...]:
    if prepared.gradient is None:
        return ()
    return tuple(Piece(prepared.gradient.elements, place, place, *slot) for place, slot in enumerate(slots))
