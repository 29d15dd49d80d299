"""Attempts become plans: the tasks of a graph with the orders in which its streams ran them. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from .cost import GradientCost, Operator, Resource
from .engine import PIECE_ELEMENTS, PIECE_TURN, STREAM, TURN
from .graph import CHUNK, GRADIENT, NEED, NEED_END, OPERATOR, PART, PLACE, RESOURCE
from .plan import Phase, PhasePlan, Task
from .recipe import Attempt, Prepared, Recipe


def phase_plan(tried: Attempt, phase: Phase, prepared: Prepared) -> PhasePlan:
    """The plan of an attempt: its tasks, in the orders in which its streams ran them."""
    graph, recipe, gradient = tried.graph, tried.recipe, prepared.gradient
    turns = tried.ints[TURN].tolist()
    streams = tried.ints[STREAM].tolist()
    tasks = _tasks(graph, recipe, phase, prepared)
    if recipe.gap_stretch is not None and gradient is not None and phase is Phase.BACKWARD:
        for piece, turn in _pool_pieces(tried, gradient.elements, prepared.layers):
            tasks.append(_reduction(piece, graph, gradient, prepared.layers))
            turns.append(turn)
            streams.append(recipe.streams.of(gradient.resource))
    numbers = sorted(range(len(tasks)), key=turns.__getitem__)
    orders = tuple(tuple(n for n in numbers if streams[n] == stream) for stream in range(len(recipe.streams.value)))
    return PhasePlan(
        phase=phase,
        layers=prepared.layers,
        parts=recipe.parts,
        degree=recipe.degree,
        weights=recipe.weights,
        horizon=recipe.horizon,
        gradient_elements=gradient.elements if gradient and phase is Phase.BACKWARD else 0,
        streams=recipe.streams,
        tasks=tuple(tasks),
        orders=orders,
    )


def _tasks(graph: Any, recipe: Recipe, phase: Phase, prepared: Prepared) -> list[Task]:
    columns = [graph[row].tolist() for row in (OPERATOR, RESOURCE, PLACE, PART, CHUNK, NEED_END)]
    need, tasks, begin = graph[NEED].tolist(), [], 0
    sent = 0
    for operator, resource, place, part, chunk, end in zip(*columns, strict=True):
        elements = recipe.pieces[chunk].elements if operator == Operator.REDUCE else 0
        layer = place if phase is Phase.FORWARD else prepared.layers - 1 - place
        if elements:
            assert prepared.gradient is not None
            layer = prepared.layers - 1 - sent // prepared.gradient.elements
        needs = tuple(sorted(set(need[begin:end])))
        tasks.append(Task(Operator(operator), Resource(resource), layer, part, chunk, needs, sent if elements else 0, elements))
        sent, begin = sent + elements, end
    return tasks


def _pool_pieces(tried: Attempt, elements: int, layers: int) -> list[tuple[tuple[int, int], int]]:
    """((first element, last + 1), turn) of what was sent of a pool, as whole numbers that add up."""
    ends = [round(end) for end in np.cumsum(tried.sends[PIECE_ELEMENTS]).tolist()]
    if ends:
        ends[-1] = layers * elements
    rows = zip([0, *ends], ends, tried.sends[PIECE_TURN].tolist(), strict=False)
    return [((begin, end), turn) for begin, end, turn in rows if end > begin]


def _reduction(piece: tuple[int, int], graph: Any, gradient: GradientCost, layers: int) -> Task:
    first, end = piece
    low, high = first // gradient.elements, (end - 1) // gradient.elements
    needs = np.flatnonzero((graph[GRADIENT] >= low) & (graph[GRADIENT] <= high)).tolist()
    return Task(Operator.REDUCE, gradient.resource, layers - 1 - low, 0, 0, tuple(needs), first, end - first)
