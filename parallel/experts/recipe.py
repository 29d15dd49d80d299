"""A recipe is how one phase is cut and ordered; an attempt is the time it takes. Pure.

Recipes are what candidates are made of: small, compared by the hundred. The best become plans (build_plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from .cost import Contention, GradientCost, LayerCost, OperatorCost, WeightGradients
from .engine import runner
from .graph import BACKWARD, FORWARD, OPERATORS, RESOURCE, RESOURCES, builders
from .plan import Phase, Streams


class Order(Enum):
    """How a stream chooses its next task."""

    IN_ORDER = "operator by operator"
    INTERLEAVED = "exchange and gather alternating by chunk"
    RANK = "the longest way on first, never idle while something is ready"
    ARRIVAL = "operator by operator, but never idle while something is ready"

    @property
    def is_strict(self) -> bool:
        """Whether a stream waits for the first of its order though others are ready."""
        return self in (Order.IN_ORDER, Order.INTERLEAVED)


@dataclass(frozen=True, slots=True)
class Piece:
    """A reduction of `elements` gradients of the layers at places `low` to `high`, at a slot of place `place` in orders."""

    elements: int
    low: int
    high: int
    place: int
    slot: float = 0.0


AFTER_DISPATCH, IN_ATTENTION = 3.0, 10.0
"""Slots of pieces: between the last dispatch and the first combine, and beside attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One phase: rows cut into `parts` of the batch and `degree` chunks of each part's experts, streams, order and reductions."""

    degree: int = 1
    parts: int = 1
    weights: WeightGradients = WeightGradients.FUSED
    horizon: int = 1
    """Deferred weight gradients of a layer's part are done before the part begins so many layers on: what they need is held as long."""
    stagger: float = 0.0
    """By so many layers each part of the batch is less urgent than the one before; for `Order.RANK`."""
    streams: Streams = Streams.THREE
    order: Order = Order.IN_ORDER
    pieces: tuple[Piece, ...] = ()
    gap_stretch: float | None = None
    """Reductions fill gaps of their links, as pieces of so much of the gap as it is foreseen; None: they are `pieces`."""


@dataclass(frozen=True, slots=True)
class Tables:
    """The costs of one layer as flat tables, for one set of deferred weight gradients."""

    alpha: np.ndarray
    work: np.ndarray


@dataclass(frozen=True, slots=True)
class Prepared:
    """A layer's costs, ready for attempts: `layers` of them, under `contention`."""

    layers: int
    contention: Contention
    cost: LayerCost
    forward: Tables
    backward: dict[WeightGradients, Tables]
    slow: np.ndarray

    @property
    def gradient(self) -> GradientCost | None:
        return self.cost.gradient

    def operators(self, phase: Phase) -> tuple[OperatorCost, ...]:
        """Rows of a phase, with weight gradients in their places."""
        return self.cost.forward if phase is Phase.FORWARD else self.cost.backward[WeightGradients.FUSED]


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a recipe takes, with the tables it is known from (graph.py, engine.py)."""

    recipe: Recipe
    seconds: float
    graph: Any
    ints: Any
    floats: Any
    sends: Any


def prepare(cost: LayerCost, contention: Contention, layers: int) -> Prepared:
    """Turn costs into tables, once for all attempts."""
    backward = {how: _tables(rows) for how, rows in cost.backward.items()}
    return Prepared(layers, contention, cost, _tables(cost.forward), backward, np.array(contention.flat))


def attempt(recipe: Recipe, phase: Phase, prepared: Prepared) -> Attempt:
    """Simulate one phase by a recipe; seconds are infinite where its order waits for itself."""
    build, keys_in_order, keys_by_rank = builders()
    is_forward = phase is Phase.FORWARD
    tables = prepared.forward if is_forward else prepared.backward[recipe.weights]
    shape = (prepared.layers, recipe.parts, recipe.degree, recipe.horizon)
    gradient = prepared.gradient
    reduction = (float(gradient.resource), gradient.alpha_s, gradient.element_s) if gradient else (0.0, 0.0, 0.0)
    pieces, slots = _piece_tables(recipe.pieces)
    graph = build(tables.alpha, tables.work, FORWARD if is_forward else BACKWARD, shape, pieces, reduction)
    if recipe.order is Order.RANK:
        key = keys_by_rank(graph, prepared.layers, recipe.stagger)
    else:
        key = keys_in_order(graph, recipe.parts, _RANKS[phase], slots, recipe.order is Order.INTERLEAVED)
        if recipe.order is Order.ARRIVAL:
            key[len(key) - len(recipe.pieces) :] += 1e12
    streams = graph[RESOURCE]
    if recipe.streams is not Streams.THREE:
        streams = np.minimum(streams, len(recipe.streams.value) - 1)
    pool = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    if recipe.gap_stretch is not None and gradient and not is_forward:
        pool = (*reduction, float(gradient.elements), float(prepared.layers), recipe.gap_stretch)
    seconds, ints, floats, sends = runner()(*graph[RESOURCE:], streams, key, recipe.order.is_strict, prepared.slow, pool)
    return Attempt(recipe, seconds if seconds >= 0 else float("inf"), graph, ints, floats, sends)


def _tables(rows: tuple[OperatorCost, ...]) -> Tables:
    alpha, work = np.zeros(OPERATORS * RESOURCES), np.zeros(OPERATORS * RESOURCES)
    for row in rows:
        at = row.operator * RESOURCES + row.resource
        alpha[at], work[at] = row.alpha_s, row.work_s
    return Tables(alpha, work)


def _piece_tables(pieces: tuple[Piece, ...]) -> tuple[Any, Any]:
    rows = (
        np.array([float(piece.elements) for piece in pieces]),
        np.array([piece.low for piece in pieces], dtype=np.int64),
        np.array([piece.high for piece in pieces], dtype=np.int64),
        np.array([piece.place for piece in pieces], dtype=np.int64),
    )
    return rows, np.array([piece.slot for piece in pieces])


def _ranks() -> dict[Phase, Any]:
    #                   attention           gate  mixture                  inverse order, weights, reduce
    forward = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0, 0.0, 0.0])
    backward = np.array([9.0, 11.0, 12.0, 8.0, 1.0, 2.0, 4.0, 5.0, 6.0, 0.0, 4.5, 11.5, 0.0])
    return {Phase.FORWARD: forward, Phase.BACKWARD: backward}


_RANKS = _ranks()
