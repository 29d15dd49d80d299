"""Graphs of phases against counts and needs by hand; keys in the order they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from efflaunch.parallel.experts import graph as g
from efflaunch.parallel.experts.cost import Operator, Resource

NO_PIECES = (np.zeros(0), *(np.zeros(0, np.int64) for _ in range(3)))
REDUCTION = (float(Resource.INTER), 0.5, 0.25)
LINKS = {
    Operator.DISPATCH: Resource.INTER,
    Operator.COMBINE: Resource.INTER,
    Operator.EXPERT_GATHER: Resource.INTRA,
    Operator.EXPERT_SCATTER: Resource.INTRA,
    Operator.ATTENTION_GATHER: Resource.INTRA,
    Operator.ATTENTION_SCATTER: Resource.INTRA,
}


def tables(*left_out: Operator, both: bool = False) -> tuple[Any, Any]:
    """alpha 1 and work 6 of every operator but reductions and those left out; `both`: dispatch on both links."""
    alpha, work = np.zeros(39), np.zeros(39)
    for operator in set(Operator) - {Operator.REDUCE, *left_out}:
        at = 3 * operator + LINKS.get(operator, Resource.COMPUTE)
        alpha[at], work[at] = 1.0, 6.0
    if both:
        alpha[3 * Operator.DISPATCH + Resource.INTRA] = 2.0
    return alpha, work


def build(sequence: Any, shape: tuple[int, int, int, int], *left_out: Operator, pieces: Any = NO_PIECES, both: bool = False) -> Any:
    return g.build(*tables(*left_out, both=both), sequence, shape, pieces, REDUCTION)


def needs(graph: Any, task: int) -> set[int]:
    begin = graph[g.NEED_END][task - 1] if task else 0
    return set(graph[g.NEED][begin : graph[g.NEED_END][task]].tolist())


def find(graph: Any, operator: Operator, place: int, part: int = 0, chunk: int = 0) -> set[int]:
    same = (graph[g.OPERATOR] == operator) & (graph[g.PLACE] == place) & (graph[g.PART] == part) & (graph[g.CHUNK] == chunk)
    return set(np.flatnonzero(same).tolist())


def all_of(graph: Any, operator: Operator, place: int, part: int = 0) -> set[int]:
    return {task for chunk in range(12) for task in find(graph, operator, place, part, chunk)}


def test_forward_by_hand() -> None:
    graph = build(g.FORWARD, (2, 2, 3, 1))
    assert len(graph[g.OPERATOR]) == 2 * 2 * (4 + 5 * 3)
    (dispatch,) = find(graph, Operator.DISPATCH, 1, 1, 2)
    assert needs(graph, dispatch) == find(graph, Operator.GATE, 1, 1)
    assert graph[g.SECONDS][dispatch] == 1.0 + 6.0 / 6
    (gather,) = find(graph, Operator.EXPERT_GATHER, 1, 1, 2)
    assert needs(graph, gather) == {dispatch}
    (first,) = find(graph, Operator.ATTENTION_GATHER, 1, 1)
    assert needs(graph, first) == all_of(graph, Operator.COMBINE, 0, 1) and graph[g.SECONDS][first] == 1.0 + 6.0 / 2


@pytest.mark.parametrize("horizon", [1, 2])
def test_backward_defers_weight_gradients_by_so_many_layers(horizon: int) -> None:
    graph = build(g.BACKWARD, (4, 2, 2, horizon))
    for part in (0, 1):
        (opens,) = find(graph, Operator.INVERSE_ORDER, 3, part)
        before = find(graph, Operator.ATTENTION_SCATTER, 2, part)
        deferred = all_of(graph, Operator.EXPERT_WEIGHTS, 3 - horizon, part) | find(graph, Operator.ATTENTION_WEIGHTS, 3 - horizon, part)
        assert len(deferred) == 3 and needs(graph, opens) == before | deferred
        (weights,) = find(graph, Operator.EXPERT_WEIGHTS, 3, part, 1)
        assert needs(graph, weights) == find(graph, Operator.EXPERTS, 3, part, 1)


def test_ids_are_topological_and_gradients_are_complete_with_the_last_of_them() -> None:
    for left_out, completes in (((), Operator.ATTENTION_WEIGHTS), ((Operator.ATTENTION_WEIGHTS,), Operator.ATTENTION)):
        graph = build(g.BACKWARD, (3, 2, 2, 1), *left_out)
        assert all(need < task for task in range(len(graph[g.OPERATOR])) for need in needs(graph, task))
        for place in range(3):
            assert set(np.flatnonzero(graph[g.GRADIENT] == place).tolist()) == all_of(graph, completes, place, 0) | all_of(
                graph, completes, place, 1
            )


def test_what_takes_no_time_is_no_task_and_hands_its_needs_on() -> None:
    graph = build(g.FORWARD, (1, 1, 2, 1), Operator.EXPERT_GATHER, Operator.EXPERT_SCATTER)
    (experts,) = find(graph, Operator.EXPERTS, 0, 0, 1)
    assert needs(graph, experts) == find(graph, Operator.DISPATCH, 0, 0, 1)
    assert not all_of(graph, Operator.EXPERT_GATHER, 0)


def test_an_operator_on_both_links_is_two_tasks_that_are_both_waited_for() -> None:
    graph = build(g.FORWARD, (1, 1, 2, 1), both=True)
    dispatches = find(graph, Operator.DISPATCH, 0, 0, 1)
    assert {graph[g.RESOURCE][task] for task in dispatches} == {Resource.INTRA, Resource.INTER}
    (gather,) = find(graph, Operator.EXPERT_GATHER, 0, 0, 1)
    assert needs(graph, gather) == dispatches


def test_pieces_wait_for_the_gradients_they_hold() -> None:
    pieces = (np.array([8.0]), np.array([0]), np.array([1]), np.array([2]))
    graph = build(g.BACKWARD, (3, 1, 1, 1), pieces=pieces)
    (piece,) = all_of(graph, Operator.REDUCE, 2)
    assert needs(graph, piece) == all_of(graph, Operator.ATTENTION_WEIGHTS, 0) | all_of(graph, Operator.ATTENTION_WEIGHTS, 1)
    assert graph[g.SECONDS][piece] == 0.5 + 8 * 0.25 and graph[g.RESOURCE][piece] == Resource.INTER


def test_keys_in_order_and_interleaved() -> None:
    graph = build(g.FORWARD, (1, 1, 2, 1))
    rank = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0, 0.0, 0.0])
    links = [task for task in range(len(graph[g.OPERATOR])) if DISPATCH <= graph[g.OPERATOR][task] <= GATHER]
    for interleaved, expected in (
        (False, [(DISPATCH, 0), (DISPATCH, 1), (GATHER, 0), (GATHER, 1)]),
        (True, [(DISPATCH, 0), (GATHER, 0), (DISPATCH, 1), (GATHER, 1)]),
    ):
        key = g.keys_in_order(graph, 1, rank, np.zeros(0), interleaved)
        ordered = sorted(links, key=lambda task: key[task])
        assert [(graph[g.OPERATOR][task], graph[g.CHUNK][task]) for task in ordered] == expected


DISPATCH, GATHER = Operator.DISPATCH, Operator.EXPERT_GATHER


def test_keys_by_rank_are_the_longest_ways_and_fillers_come_last() -> None:
    graph = build(g.BACKWARD, (2, 2, 1, 1))
    key = g.keys_by_rank(graph, 2, 0.5)
    fillers = np.isin(graph[g.OPERATOR], g.WEIGHTS)
    assert key[~fillers].max() < key[fillers].min()
    longest = -g.keys_by_rank(graph, 2, 0.0).min()
    (first,), (second,) = (find(graph, Operator.INVERSE_ORDER, 0, part) for part in (0, 1))
    assert key[second] - key[first] == pytest.approx(longest / 2 * 0.5)
    # One part by itself: ten operators of 1 + 6 / 2 seconds in each of two layers.
    assert longest == pytest.approx(2 * 10 * 4.0)


def test_compiled_loops_build_the_same() -> None:
    shape, pieces = (3, 2, 3, 2), (np.array([8.0, 4.0]), np.array([0, 1]), np.array([1, 1]), np.array([2, 3]))
    compiled = g.builders()[0](*tables(both=True), g.BACKWARD, shape, pieces, REDUCTION)
    for one, other in zip(build(g.BACKWARD, shape, pieces=pieces, both=True), compiled, strict=True):
        assert one.tolist() == other.tolist()
